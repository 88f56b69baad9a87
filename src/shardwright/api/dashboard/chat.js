// The chat box. What the model writes becomes text nodes and nothing else; the conversation lives in this page alone.

import { byId, h, setAttribute, setText } from "./dom.js";
import { counted, duration, tokenRate } from "./format.js";
import { eventsOf } from "./events.js";
import { ask, ServerError } from "./server.js";

/** The request's fields from the form's values (texts, empty where nothing was given). Raises `RangeError`. */
export function fieldsOf(values) {
  const fields = {};
  const take = (name, text, label, check) => {
    if (text.trim() === "") return;
    const value = Number(text);
    if (!check(value)) throw new RangeError(`${label} is ${text}`);
    fields[name] = value;
  };
  take("temperature", values.temperature, "The temperature must lie between 0 and 2; it", (value) => value >= 0 && value <= 2);
  take("top_p", values.topP, "Top p must be above 0 and at most 1; it", (value) => value > 0 && value <= 1);
  take("max_tokens", values.maxTokens, "The most tokens must be a whole number from 1 on; it", (value) => Number.isInteger(value) && value >= 1);
  take("seed", values.seed, "The seed must be a whole number from 0 on; it", (value) => Number.isSafeInteger(value) && value >= 0);
  return fields;
}

/** Counts tokens and times of one answer, from what arrives. Times are in milliseconds. */
export class Pace {
  constructor(beganAt) {
    this.beganAt = beganAt;
    this.firstAt = null;
    this.lastAt = null;
    this.numPieces = 0;
    this.numTokens = null; // as the server counted them
  }

  piece(at) {
    this.firstAt ??= at;
    this.lastAt = at;
    this.numPieces += 1;
  }

  /** "0.21 s to the first token, 52 tokens at 31.2 tok/s"; before the server's count, pieces stand for tokens. */
  toString() {
    if (this.firstAt === null) return "";
    const num = this.numTokens ?? this.numPieces;
    const spent = (this.lastAt - this.firstAt) / 1000;
    const pace = spent > 0 && num > 1 ? ` at ${tokenRate((num - 1) / spent)}` : "";
    return `${duration((this.firstAt - this.beganAt) / 1000)} to the first token, ${this.numTokens === null ? "about " : ""}${counted(num, "token")}${pace}`;
  }
}

/** The chat box; `facts` say how the model is talked to, `needsKey` is called when the server wants another key. */
export class Chat {
  #facts;
  #needsKey;
  #history = []; // {role, content}
  #abort = null;
  #log = byId("chat-log");

  constructor(facts, { needsKey }) {
    this.#facts = facts;
    this.#needsKey = needsKey;
    const note = byId("chat-note");
    if (!facts.has_tokenizer) setText(note, "This model has no tokenizer: give token ids, with spaces between them. It answers without text.");
    else if (!facts.has_chat_template) setText(note, "This model has no chat template: it goes on from your text.");
    note.hidden = note.textContent === "";
    byId("p-system").disabled = !this.#isChat;
    byId("chat-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    byId("chat-input").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#send();
    });
    byId("chat-stop").addEventListener("click", () => this.#abort?.abort());
    byId("chat-new").addEventListener("click", () => {
      this.#abort?.abort();
      this.#history = [];
      this.#log.replaceChildren();
      setText(byId("chat-status"), "");
      byId("chat-input").focus();
    });
  }

  /** The model's name as the API wants it. */
  model = "";

  get #isChat() {
    return this.#facts.has_chat_template && this.#facts.has_tokenizer;
  }

  #request(text) {
    const fields = fieldsOf({
      temperature: byId("p-temperature").value,
      topP: byId("p-top-p").value,
      maxTokens: byId("p-max-tokens").value,
      seed: byId("p-seed").value,
    });
    const common = { model: this.model, ...fields, stream: true, stream_options: { include_usage: true } };
    if (!this.#isChat) {
      if (this.#facts.has_tokenizer) return ["v1/completions", { ...common, prompt: text }];
      const ids = text.trim().split(/[\s,]+/).map(Number);
      if (!ids.every((id) => Number.isSafeInteger(id) && id >= 0)) throw new RangeError("Token ids are whole numbers with spaces between them");
      return ["v1/completions", { ...common, prompt: ids }];
    }
    const system = byId("p-system").value.trim();
    const messages = [...(system ? [{ role: "system", content: system }] : []), ...this.#history, { role: "user", content: text }];
    return ["v1/chat/completions", { ...common, messages }];
  }

  async #send() {
    const input = byId("chat-input");
    const text = input.value;
    if (this.#abort !== null || text.trim() === "") return;
    let path;
    let body;
    try {
      if (!this.model) throw new RangeError("The server has not told its model yet");
      [path, body] = this.#request(text);
    } catch (error) {
      if (!(error instanceof RangeError)) throw error;
      setText(byId("chat-status"), error.message);
      return;
    }
    const abort = new AbortController();
    this.#abort = abort;
    this.#setBusy(true);
    this.#add("user", "You", text);
    const [answer, foot] = this.#add("assistant", this.model, "");
    const content = document.createTextNode("");
    answer.append(content);
    input.value = "";
    setText(byId("chat-status"), "Waiting for the first token");
    const pace = new Pace(performance.now());
    let ending = "";
    try {
      const response = await ask(path, { method: "POST", body, signal: abort.signal });
      let isDone = false;
      for await (const { data } of eventsOf(response)) {
        if (data === "[DONE]") {
          isDone = true;
          break;
        }
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ServerError(200, chunk.error.message);
        if (chunk.usage) pace.numTokens = chunk.usage.completion_tokens;
        const choice = chunk.choices?.[0];
        const piece = choice?.delta?.content ?? choice?.text ?? "";
        if (choice?.finish_reason === "length") ending = "It reached its most tokens.";
        if (!choice || (piece === "" && choice.finish_reason === null && choice.delta?.role)) continue;
        if (piece !== "") {
          if (pace.firstAt === null) setText(byId("chat-status"), "Answering");
          pace.piece(performance.now());
        }
        this.#append(content, piece);
        setText(foot, String(pace));
      }
      if (!isDone) ending = "The answer broke off.";
    } catch (error) {
      if (abort.signal.aborted) ending = "Stopped.";
      else if (error instanceof ServerError) {
        ending = error.message;
        if (error.status === 401) this.#needsKey(error.message);
      } else if (error instanceof TypeError) ending = "The server can't be reached.";
      else throw error;
    } finally {
      this.#abort = null;
      this.#setBusy(false);
    }
    const isFailed = content.data === "" && pace.numTokens === null;
    if (isFailed) {
      setAttribute(answer.parentElement, "data-failed", "");
      if (input.value === "") input.value = text; // to be sent again
    } else {
      this.#history.push({ role: "user", content: text }, { role: "assistant", content: content.data });
    }
    setText(foot, [String(pace), ending].filter(Boolean).join(". "));
    setText(byId("chat-status"), isFailed ? ending : `Answer ${ending === "Stopped." ? "stopped" : "complete"}: ${pace}`);
  }

  #setBusy(isBusy) {
    byId("chat-send").disabled = isBusy;
    byId("chat-stop").disabled = !isBusy;
    setAttribute(this.#log, "aria-busy", isBusy);
  }

  #add(role, name, text) {
    const content = h("div", { class: "message-text" }, ...(text ? [text] : []));
    const foot = h("p", { class: "muted small figure-left" });
    this.#log.append(h("article", { class: `message ${role}`, "aria-label": role === "user" ? "Your message" : "Answer" },
      h("p", { class: "message-name" }, name), content, foot));
    this.#log.scrollTop = this.#log.scrollHeight;
    return [content, foot];
  }

  #append(node, text) {
    const isAtEnd = this.#log.scrollHeight - this.#log.scrollTop - this.#log.clientHeight < 40;
    node.appendData(text);
    if (isAtEnd) this.#log.scrollTop = this.#log.scrollHeight;
  }
}
