// A streamed chat completion: request, server-sent events, errors. Knows no page.

// Turns text that was cut anywhere into the data of each event that is whole.
export class EventParser {
  #rest = "";
  #data = [];
  #afterReturn = false; // a line feed that follows belongs to the same line end

  push(text) {
    if (text === "") return [];
    if (this.#afterReturn && text[0] === "\n") text = text.slice(1);
    this.#afterReturn = text.endsWith("\r");
    const lines = (this.#rest + text).split(/\r\n|\r|\n/);
    this.#rest = lines.pop();
    return lines.flatMap((line) => this.#take(line));
  }

  #take(line) {
    if (line === "") {
      const event = this.#data.join("\n");
      const whole = this.#data.length > 0;
      this.#data = [];
      return whole ? [event] : [];
    }
    const [, name, value] = /^([^:]*)(?:: ?(.*))?$/su.exec(line);
    if (name === "data") this.#data.push(value ?? "");
    return [];
  }
}

// What went wrong, in words for the reader. `status` is that of the HTTP answer, where there was one.
export class ServerError extends Error {
  constructor(message, status = null) {
    super(message);
    this.status = status;
  }
}

// One request, with the key if there is one. Throws ServerError, or AbortError if it was stopped.
export async function request(path, key, options = {}) {
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  const url = new URL(path, location.href); // the page's base may hold a name and password, which fetch refuses
  let response;
  try {
    response = await fetch(url, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(`The server cannot be reached: ${error.message}.`);
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const text = await response.text().catch(() => "");
  const wait = response.headers.get("retry-after") ?? "";
  const later = /^\d+$/.test(wait) ? ` Try again in ${wait} s.` : "";
  const why = reason(text) || response.statusText || "no reason given";
  return new ServerError(`${response.status}: ${why}${later}`, response.status);
}

// The words in the body of an error: OpenAI's form, the framework's, or plain text.
function reason(text) {
  let body;
  try {
    body = JSON.parse(text);
  } catch {
    return text.trim().slice(0, 500);
  }
  const found = body?.error?.message ?? body?.error ?? body?.message ?? body?.detail ?? body;
  return typeof found === "string" ? found : JSON.stringify(found).slice(0, 500);
}

// Yields { text, finish, usage } for each chunk. Ends when [DONE] came; a stream without it is an error.
export async function* complete(body, key, signal) {
  const response = await request("v1/chat/completions", key, {
    method: "POST", signal, headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
  });
  const type = response.headers.get("content-type") ?? "nothing";
  if (!type.startsWith("text/event-stream")) throw new ServerError(`The server sent ${type} in place of a stream.`);
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    yield readChunk(data);
  }
  throw new ServerError("Cut: the stream ended before the answer did.");
}

async function* events(body) {
  const parser = new EventParser();
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      yield* parser.push(value);
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ServerError) throw error;
    throw new ServerError(`Cut: the connection broke (${error.message}).`);
  } finally {
    reader.cancel().catch(() => {}); // what failed was told already
  }
}

function readChunk(data) {
  let chunk;
  try {
    chunk = JSON.parse(data);
  } catch {
    throw new ServerError(`The stream holds what is not JSON: ${data.slice(0, 200)}`);
  }
  if (chunk.error) throw new ServerError(reason(data) || "The server gave no reason.");
  const choice = chunk.choices?.[0];
  return { text: choice?.delta?.content ?? "", finish: choice?.finish_reason ?? null, usage: chunk.usage ?? null };
}
