// Puts the page together: what the server tells goes to the parts that show it.

import { changesBetween } from "./changes.js";
import { Charts } from "./charts.js";
import { Chat } from "./chat.js";
import { byId, setAttribute, setText } from "./dom.js";
import { EventLog } from "./eventlog.js";
import { Pipeline } from "./pipeline.js";
import { Requests } from "./requests.js";
import { askJson, key, Listener } from "./server.js";
import { StepStore } from "./steps.js";
import { Timeline } from "./timeline.js";

const ASLEEP_AFTER_MS = 5 * 60_000; // in a hidden tab: the server need not tell what nobody sees
const CLOCK_SAMPLES = 60;
const FACTS_PAUSE_MS = 3000;

/** The master's time from this machine's clock: the sample with the least delay tells the difference best. */
class MasterClock {
  #samples = [];

  take(masterSeconds) {
    this.#samples.push(Date.now() / 1000 - masterSeconds);
    if (this.#samples.length > CLOCK_SAMPLES) this.#samples.shift();
  }

  reset() {
    this.#samples = [];
  }

  now = () => Date.now() / 1000 - (this.#samples.length ? Math.min(...this.#samples) : 0);
}

const masterClock = new MasterClock();
const store = new StepStore();
const log = new EventLog(byId("log-list"));
const pipeline = new Pipeline();
const timeline = new Timeline(store, masterClock.now);
const requests = new Requests(store, masterClock.now);
const charts = new Charts(byId("charts"));
let chat = null;
let view = null;
let lastRequests = null;
let hasHistory = false;

function onState(fresh) {
  if (view && view.started_at !== fresh.started_at) {
    masterClock.reset(); // another master, perhaps on another machine
    store.clear();
    requests.clear();
  }
  masterClock.take(fresh.at);
  for (const { level, text } of changesBetween(view, fresh)) log.add(fresh.at, level, text);
  view = fresh;
  if (chat) chat.model = fresh.model_name;
  if (document.hidden) return;
  showView();
  showRequests();
}

function showView() {
  if (!view) return;
  const waiting = view.snapshot.recovering_from ? "recovering" : "not ready";
  const [level, text] = view.failure ? ["bad", "failed"] : view.is_ready ? ["good", "ready"] : ["warn", waiting];
  setAttribute(byId("ready"), "data-level", level);
  setText(byId("ready"), text);
  setText(byId("model"), view.model_name);
  document.title = `${view.failure ? "failed \u00b7 " : ""}${view.model_name} \u00b7 Shardwright`;
  timeline.setPipeline(view.snapshot.stages.map((stage) => stage.worker_id), view.snapshot.epoch);
  pipeline.show(view);
}

function showRequests() {
  if (lastRequests) requests.show(lastRequests);
}

function onEvent(name, data) {
  if (name === "state") onState(data);
  else if (name === "steps") store.add(data.steps);
  else if (name === "requests") {
    const isFirst = lastRequests === null;
    lastRequests = data.requests; // drawn with each state
    if (isFirst && !document.hidden) showRequests();
  } else if (name === "history") {
    if (hasHistory) charts.add(data.history);
    else charts.set(data.history);
    hasHistory = true;
  }
}

// --- the connection ---------------------------------------------------------------------------------

let wasLost = false;
let bannerTimer = 0;

function onChange({ phase, reason, retryAtMs }) {
  clearInterval(bannerTimer);
  const banner = byId("banner");
  setText(byId("link-state"), { connecting: "connecting", open: "live", waiting: "connection lost", key: "key needed", asleep: "paused" }[phase]);
  if (phase === "open") {
    hasHistory = false; // it comes whole again
    banner.hidden = true;
    if (wasLost) log.add(Date.now() / 1000, "good", "connected to the server again");
    wasLost = false;
  } else if (phase === "waiting") {
    if (!wasLost) log.add(Date.now() / 1000, "bad", `connection to the server lost: ${reason}`);
    wasLost = true;
    setAttribute(byId("ready"), "data-level", "none");
    setText(byId("ready"), "unknown");
    setText(byId("banner-text"), `No connection to the server (${reason}). What is shown is old; it is tried again by itself.`);
    banner.hidden = false;
    const tell = () => {
      const left = Math.max(Math.ceil((retryAtMs - Date.now()) / 1000), 0);
      setText(byId("link-state"), `connection lost, next try in ${left}\u202fs`);
    };
    tell();
    bannerTimer = setInterval(tell, 1000);
  } else if (phase === "key") {
    askForKey(reason);
  }
}

const listener = new Listener("api/events", { onEvent, onChange });

byId("banner-retry").addEventListener("click", () => {
  if (isKeyWanted) askForKey("");
  else listener.start();
});

let sleepTimer = 0;
let isAsleep = false;
document.addEventListener("visibilitychange", () => {
  clearTimeout(sleepTimer);
  if (document.hidden) {
    sleepTimer = setTimeout(() => {
      if (byId("key-dialog").open) return;
      isAsleep = true;
      listener.sleep();
    }, ASLEEP_AFTER_MS);
    return;
  }
  if (isAsleep) {
    isAsleep = false;
    listener.start();
  }
  showView();
  showRequests();
});

// --- the key ----------------------------------------------------------------------------------------

let isKeyWanted = false;

function askForKey(reason) {
  isKeyWanted = true;
  const dialog = byId("key-dialog");
  const error = byId("key-error");
  error.hidden = !reason;
  setText(error, reason ?? "");
  byId("key-input").value = "";
  if (!dialog.open) dialog.showModal();
  byId("key-input").focus();
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const value = byId("key-input").value.trim();
  if (value === "") return;
  key.set(value);
  byId("key-input").value = "";
  isKeyWanted = false;
  byId("banner").hidden = true;
  byId("forget-key").hidden = false;
  byId("key-dialog").close();
  listener.start();
});

byId("key-dialog").addEventListener("cancel", (event) => event.preventDefault()); // without a key there is nothing to show

byId("key-dialog").addEventListener("close", () => {
  if (!isKeyWanted) return; // browsers close it at a second Escape all the same
  setText(byId("banner-text"), "The server asks for an API key.");
  byId("banner").hidden = false;
});

byId("forget-key").addEventListener("click", () => {
  key.forget();
  location.reload();
});

// --- the theme --------------------------------------------------------------------------------------

function nameTheme() {
  setText(byId("theme"), document.documentElement.dataset.theme === "dark" ? "Light theme" : "Dark theme");
}
byId("theme").addEventListener("click", () => document.dispatchEvent(new Event("themetoggle")));
document.addEventListener("themechange", nameTheme);
nameTheme();

// --- the start --------------------------------------------------------------------------------------

async function begin() {
  let facts;
  try {
    facts = await askJson("dashboard/server.json");
  } catch (error) {
    setText(byId("banner-text"), `The server does not answer (${error.message}). It is tried again by itself.`);
    byId("banner").hidden = false;
    setTimeout(begin, FACTS_PAUSE_MS);
    return;
  }
  byId("banner").hidden = true;
  setText(byId("version"), `Shardwright ${facts.version}`);
  chat = new Chat(facts, {
    needsKey: (reason) => {
      if (facts.needs_key) askForKey(reason);
    },
  });
  byId("forget-key").hidden = !key.get();
  if (facts.needs_key && !key.get()) askForKey("");
  else listener.start();
}

begin();
