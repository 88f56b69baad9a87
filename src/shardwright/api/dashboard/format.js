// Figures as people read them: with units, three significant digits, and a dash for what is not known.

export const UNKNOWN = "\u2013";
const NARROW = "\u202f"; // between a figure and its unit, never broken

/** Three significant digits, whole numbers from 100 on, with separators between thousands. */
export function number(value) {
  if (!Number.isFinite(value)) return UNKNOWN;
  const size = Math.abs(value);
  if (size >= 99.95) return Math.round(value).toLocaleString("en-US").replaceAll(",", NARROW);
  if (size >= 9.995) return value.toFixed(1);
  if (size === 0 || size >= 0.995) return value.toFixed(2).replace(/^(-?\d+)\.00$/, "$1");
  return String(Number(value.toPrecision(3)));
}

/** A whole number with separators. */
export function count(value) {
  return Number.isFinite(value) ? Math.round(value).toLocaleString("en-US").replaceAll(",", NARROW) : UNKNOWN;
}

/** "1 step", "12 steps". */
export function counted(value, noun, plural = `${noun}s`) {
  return `${count(value)} ${value === 1 ? noun : plural}`;
}

function scaled(value, units, base) {
  let index = 0;
  // The figure is rounded before the unit is chosen: 1023.9 KiB are 1 MiB, not 1024 KiB.
  while (index < units.length - 1 && Math.round(Math.abs(value)) >= base) {
    value /= base;
    index += 1;
  }
  return `${index === 0 ? count(value) : number(value)}${NARROW}${units[index]}`;
}

/** Bytes in binary units. */
export function bytes(value) {
  return Number.isFinite(value) ? scaled(value, ["B", "KiB", "MiB", "GiB", "TiB", "PiB"], 1024) : UNKNOWN;
}

/** Bytes a second. */
export function rate(value) {
  return Number.isFinite(value) ? `${bytes(value)}/s` : UNKNOWN;
}

/** A duration given in seconds, from microseconds to days. */
export function duration(seconds) {
  if (!Number.isFinite(seconds)) return UNKNOWN;
  const size = Math.abs(seconds);
  if (size === 0) return `0${NARROW}s`;
  if (size < 0.0009995) return `${number(seconds * 1e6)}${NARROW}\u00b5s`;
  if (size < 0.9995) return `${number(seconds * 1e3)}${NARROW}ms`;
  if (size < 59.95) return `${number(seconds)}${NARROW}s`;
  const whole = Math.round(size);
  const sign = seconds < 0 ? "-" : "";
  if (whole < 3600) return `${sign}${Math.floor(whole / 60)}${NARROW}min ${whole % 60}${NARROW}s`;
  const minutes = Math.round(size / 60);
  if (minutes < 1440) return `${sign}${Math.floor(minutes / 60)}${NARROW}h ${minutes % 60}${NARROW}min`;
  const hours = Math.round(size / 3600);
  return `${sign}${Math.floor(hours / 24)}${NARROW}d ${hours % 24}${NARROW}h`;
}

/** A ratio from 0 to 1 as percent. */
export function percent(ratio) {
  if (!Number.isFinite(ratio)) return UNKNOWN;
  const value = ratio * 100;
  if (value > 0 && value < 0.05) return `<0.1${NARROW}%`;
  return `${value !== 0 && Math.abs(value) < 9.95 ? value.toFixed(1) : Math.round(value)}${NARROW}%`;
}

/** Tokens a second. */
export function tokenRate(value) {
  return Number.isFinite(value) ? `${number(value)}${NARROW}tok/s` : UNKNOWN;
}

/** The time of day of seconds since 1970, in the reader's time zone. */
export function clock(seconds, { tenths = false } = {}) {
  if (!Number.isFinite(seconds)) return UNKNOWN;
  const at = new Date(seconds * 1000);
  const parts = [at.getHours(), at.getMinutes(), at.getSeconds()].map((part) => String(part).padStart(2, "0"));
  return parts.join(":") + (tenths ? `.${Math.floor(at.getMilliseconds() / 100)}` : "");
}

/** The layers `first` to `end` (exclusive) as people count them: "0–14", "7". */
export function layers(first, end) {
  if (!Number.isInteger(first) || !Number.isInteger(end)) return UNKNOWN;
  return end - first === 1 ? String(first) : `${first}\u2013${end - 1}`;
}

/** Ticks of an axis from 0 to at least `top`: 1, 2 or 5 times a power of ten apart, about `wanted` of them. */
export function ticks(top, wanted = 4) {
  if (!(top > 0) || !Number.isFinite(top)) return [0, 1];
  const rough = top / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough * 0.999) ?? 10 * power;
  const numSteps = Math.ceil(top / step - 1e-9);
  return Array.from({ length: numSteps + 1 }, (_, index) => Number((index * step).toPrecision(12)));
}
