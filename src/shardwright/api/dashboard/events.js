// Server-sent events as the standard defines them, cut out of text that arrives in arbitrary pieces.

/** Collects text and gives the events that are whole. */
export class EventParser {
  #rest = "";
  #event = "";
  #data = [];
  #endedInReturn = false;

  /** Take the next piece of text; give the events that it completes as `{event, data}`. */
  push(text) {
    if (this.#endedInReturn && text.startsWith("\n")) text = text.slice(1);
    if (text) this.#endedInReturn = text.endsWith("\r");
    const lines = (this.#rest + text).split(/\r\n|\r|\n/);
    this.#rest = lines.pop();
    const found = [];
    for (const line of lines) {
      if (line === "") {
        if (this.#data.length) found.push({ event: this.#event || "message", data: this.#data.join("\n") });
        this.#event = "";
        this.#data = [];
        continue;
      }
      const colon = line.indexOf(":");
      if (colon === 0) continue; // a comment that keeps the connection alive
      const field = colon < 0 ? line : line.slice(0, colon);
      const value = colon < 0 ? "" : line.slice(line[colon + 1] === " " ? colon + 2 : colon + 1);
      if (field === "event") this.#event = value;
      else if (field === "data") this.#data.push(value);
    }
    return found;
  }
}

/** The events of an answer whose body is an event stream. `onPiece` is called for whatever arrives, comments too. */
export async function* eventsOf(response, onPiece = () => {}) {
  const parser = new EventParser();
  const decoder = new TextDecoder();
  const reader = response.body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      onPiece();
      yield* parser.push(decoder.decode(value, { stream: true }));
    }
  } finally {
    reader.cancel().catch(() => {}); // whoever stops listening early lets the server know
  }
}
