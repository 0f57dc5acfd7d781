// One answer on its way: what has come of it, its numbers, and how it is drawn. Asks the server for nothing.

import { blocks } from "./text.js";

export class Answer {
  text = "";
  state = "waiting"; // then running, then one of whole, stopped, failed
  finish = null;
  usage = null;
  error = null;
  #ends = []; // the length of the text after each piece: a piece is a token, or the few that a draft added at once
  #begun = 0;
  #first = 0;
  #last = 0;

  // `title` is what stands above it, `body` the request that asks for it.
  constructor(title, body) {
    this.title = title;
    this.body = body;
  }

  begin() {
    this.state = "running";
    this.#begun = performance.now();
  }

  take({ text, finish, usage }) {
    this.finish = finish ?? this.finish;
    this.usage = usage ?? this.usage;
    if (text === "") return;
    this.#last = performance.now();
    this.#first ||= this.#last;
    this.text += text;
    this.#ends.push(this.text.length);
  }

  end(state, error = null) {
    this.state = state;
    this.error = error;
  }

  get over() {
    return this.state !== "waiting" && this.state !== "running";
  }

  get ended() { // by the model's own choice
    return this.state === "whole" && this.finish === "stop";
  }

  // Which token the character at an index belongs to, from 1; { exact } where pieces and tokens are the same.
  tokenAt(index) {
    const found = this.#ends.findIndex((end) => end > index);
    const silent = (this.usage?.completion_tokens ?? NaN) - this.#ends.length; // the end token may have been counted
    return { number: (found < 0 ? this.#ends.length : found) + 1, exact: silent === 0 || (silent === 1 && this.ended) };
  }

  // Seconds, tokens per second, tokens, share: the server's own where it told them, else as seen here; null: not known.
  get numbers() {
    const told = this.usage?.gossamer ?? {};
    const tokens = this.usage?.completion_tokens ?? this.#ends.length;
    const steady = 0.1; // seconds of text until a speed says anything
    const seconds = (this.#last - this.#first) / 1000;
    return {
      ttft: told.ttft_s ?? (this.#first ? (this.#first - this.#begun) / 1000 : null),
      speed: told.tokens_per_s ?? (tokens > 1 && seconds > steady ? (tokens - 1) / seconds : null),
      tokens: tokens || null,
      accepted: told.acceptance_rate ?? null,
    };
  }
}

// [number, unit] of each of an answer's numbers, for people.
export function written({ ttft, speed, tokens, accepted }) {
  return {
    ttft: ttft === null ? null : ttft < 10 ? [Math.round(ttft * 1000), "ms"] : [ttft.toFixed(1), "s"],
    speed: speed === null ? null : [speed.toFixed(speed < 100 ? 1 : 0), "tok/s"],
    tokens: tokens === null ? null : [tokens, ""],
    accepted: accepted === null ? null : [Math.round(accepted * 100), "%"],
  };
}

const STATES = { waiting: "Waiting for its turn", running: "", stopped: "Stopped", failed: "" };

function stateOf(answer) {
  if (answer.state !== "whole") return STATES[answer.state];
  if (answer.finish === "length") return "Reached the most tokens";
  return answer.text === "" ? "The answer is empty" : "";
}

// Draws an answer into its element; `from` is the index from which it is marked, or null.
export function drawAnswer(element, answer, from) {
  element.classList.toggle("busy", answer.state === "running");
  element.setAttribute("aria-busy", String(answer.state === "running"));
  setText(element.querySelector("h3"), answer.title);
  drawText(element.querySelector(".text"), answer.text, from ?? Infinity);
  setText(element.querySelector(".error"), answer.error?.message ?? "");
  setText(element.querySelector(".state"), stateOf(answer));
  const { ttft, speed, tokens, accepted } = written(answer.numbers);
  const named = (word, number) => number && [...number, word];
  const parts = [ttft && ["TTFT", ...ttft], speed, named("tokens", tokens), named("accepted", accepted)];
  const line = parts.filter(Boolean).map((part) => part.filter((word) => word !== "").join(" ")).join(" · ");
  setText(element.querySelector(".numbers"), answer.over ? line : "");
}

function drawText(target, text, from) {
  const parts = blocks(text);
  let marked = false;
  parts.forEach(({ code, start, end }, i) => {
    const element = blockAt(target, i, code ? "PRE" : "P");
    const edge = Math.min(Math.max(from, start), end);
    const first = marked || edge === end ? "" : String.fromCodePoint(text.codePointAt(edge));
    marked ||= first !== "";
    const [same, fork, rest] = element.children;
    setText(same, text.slice(start, edge));
    setText(fork, first);
    setText(rest, text.slice(edge + first.length, end));
  });
  while (target.children.length > parts.length) target.lastChild.remove();
}

// The block at a place, made anew only if its kind changed: a selection survives what is streamed below it.
function blockAt(target, index, tag) {
  const old = target.children[index];
  if (old?.tagName === tag) return old;
  const made = document.createElement(tag);
  const fork = document.createElement("mark");
  fork.className = "first";
  made.append(document.createElement("span"), fork, document.createElement("mark"));
  if (old) old.replaceWith(made);
  else target.append(made);
  return made;
}

export function setText(element, text) {
  const node = element.firstChild;
  if (!node) element.textContent = text;
  else if (text !== node.data) {
    if (text.startsWith(node.data)) node.appendData(text.slice(node.data.length));
    else element.textContent = text;
  }
}
