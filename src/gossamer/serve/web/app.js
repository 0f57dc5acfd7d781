// The playground: columns, settings, the key, and turns of a conversation with one or two models at once.

import { Answer, drawAnswer, setText, written } from "./answer.js";
import { complete, request } from "./stream.js";
import { drawVerdict } from "./verdict.js";

const $ = (id) => document.getElementById(id);
const clone = (id) => $(id).content.firstElementChild.cloneNode(true);
const SIDES = ["Left", "Right"];
const KEY = "gossamer-key";
const SETTINGS = { temperature: "temperature", max_tokens: "max tokens", seed: "seed", system: "system prompt" };

const heads = SIDES.map(() => $("heads").appendChild(clone("head")));
const setups = SIDES.map(() => $("setups").appendChild(clone("setup")));
const selects = heads.map((head) => head.querySelector("select"));

let models = [];
let turns = []; // { element, prompt, answers, sameHistory }
let running = null; // { stop, done } of what is being answered
let key = "";
try {
  key = sessionStorage.getItem(KEY) ?? "";
} catch { /* the browser keeps nothing: the key lives as long as the page */ }

// Columns and settings

const separate = () => $("separate").checked;
const columns = () => (models.length > 1 || separate() ? [0, 1] : [0]);
const setupOf = (column) => setups[separate() ? column : 0];
const field = (column, name) => setupOf(column).querySelector(`[name=${name}]`);

function shape() {
  const two = columns().length > 1;
  document.body.classList.toggle("alone", !two);
  $("heads").hidden = models.length === 0;
  $("prompt").placeholder = two ? "Ask both" : "Ask";
  heads[1].hidden = !two;
  setups[1].hidden = !separate();
  $("in-turn-label").hidden = !two;
  const each = models.length > 1 ? "Settings of its own for each model" : "Compare two settings of this model";
  setText($("separate-label"), each);
  SIDES.forEach((side, i) => {
    setText(setups[i].querySelector("legend"), separate() ? side : "");
    setText(heads[i].querySelector("label span"), two ? `${side} model` : "Model");
    const setup = heads[i].querySelector(".setup");
    setup.hidden = !separate();
    setText(setup, own(i) || "same settings as the other");
  });
  setText($("welcome").querySelector("h2"), two ? "One prompt, two answers" : "What would you like to know?");
  setText($("welcome").querySelector("p"), two
    ? "Both get the same words. Their answers are compared letter by letter and marked from where they part."
    : "To see what a setting changes, open the settings: the model can answer under two of them, side by side.");
}

// The settings of a column that differ from the other's, in words.
function own(column) {
  const differing = Object.keys(SETTINGS).filter((name) => field(0, name).value !== field(1, name).value);
  return differing.map((name) => `${SETTINGS[name]} ${field(column, name).value || "none"}`).join(", ");
}

function fillSelects() {
  selects.forEach((select, column) => {
    const chosen = models.includes(select.value) ? select.value : models[Math.min(column, models.length - 1)];
    select.replaceChildren(...models.map((id) => new Option(id, id, false, id === chosen)));
    select.disabled = models.length < 2;
    select.title = chosen ?? "";
  });
}

async function loadModels() {
  $("notice").hidden = true;
  try {
    const list = await (await request("v1/models", key)).json();
    models = list.data.map((model) => model.id);
    if (models.length === 0) throw new Error("The server has no model to talk to.");
  } catch (error) {
    models = [];
    if (error.status === 401) askKey();
    else notify(error.message);
  }
  fillSelects();
  shape();
  $("send").disabled = models.length === 0;
  $("welcome").hidden = turns.length > 0 || models.length === 0;
}

function notify(message) {
  setText($("notice").firstElementChild, message);
  $("notice").hidden = false;
}

// Whether every setting in use holds; if not, the first that does not is shown with the reason.
function settingsHold() {
  const inputs = columns().flatMap((column) => [...setupOf(column).querySelectorAll("input")]);
  const bad = inputs.find((input) => !input.validity.valid);
  if (bad) {
    openSettings(true);
    bad.reportValidity();
  }
  return !bad;
}

function openSettings(open) {
  $("settings").hidden = !open;
  $("settings-button").setAttribute("aria-expanded", String(open));
}

// The key

function askKey() {
  const first = "The server asks for a key. It is kept until this tab is closed.";
  setText($("key-note"), key ? "The server refused this key." : first);
  $("key-form").hidden = false;
  $("key").focus();
}

async function useKey() {
  key = $("key").value.trim();
  try {
    sessionStorage.setItem(KEY, key);
  } catch { /* see above */ }
  $("key-form").hidden = true;
  await loadModels();
  if (models.length === 0) return;
  $("key").value = "";
  $("prompt").focus();
  const turn = turns.at(-1);
  if (turn) retry(turn, turn.answers.flatMap((answer, i) => (answer.error?.status === 401 ? [i] : [])));
}

// Turns

// What a column is sent: its own answers so far, those that broke off included, and no turn without one.
function messagesOf(column, prompt) {
  const system = field(column, "system").value.trim();
  const past = turns.filter((turn) => turn.answers[column]?.text).flatMap((turn) => [
    { role: "user", content: turn.prompt }, { role: "assistant", content: turn.answers[column].text },
  ]);
  return [...(system ? [{ role: "system", content: system }] : []), ...past, { role: "user", content: prompt }];
}

function newAnswer(column, prompt) {
  const body = { model: selects[column].value, messages: messagesOf(column, prompt) };
  for (const name of ["temperature", "max_tokens", "seed"]) {
    const value = field(column, name).value;
    if (value !== "") body[name] = Number(value);
  }
  const settings = separate() ? own(column) : "";
  return new Answer(settings ? `${body.model}, ${settings}` : body.model, body);
}

function send(prompt) {
  if (running || models.length === 0 || prompt.trim() === "" || !settingsHold()) return;
  const answers = columns().map((column) => newAnswer(column, prompt));
  const pasts = answers.map((answer) => JSON.stringify(answer.body.messages.filter((m) => m.role === "assistant")));
  const turn = { element: clone("turn"), prompt, answers, sameHistory: pasts[0] === pasts.at(-1) };
  turn.element.classList.toggle("alone", answers.length === 1);
  setText(turn.element.querySelector(".prompt"), prompt);
  answers.forEach((_, i) => {
    const element = turn.element.querySelector(".answers").appendChild(clone("answer"));
    element.querySelector(".again").addEventListener("click", () => retry(turn, [i]));
  });
  turns.push(turn);
  $("welcome").hidden = true;
  $("turns").append(turn.element);
  $("prompt").value = "";
  run(turn, answers);
  $("conversation").scrollTop = $("conversation").scrollHeight;
}

function retry(turn, which) {
  if (running || which.length === 0) return;
  for (const i of which) turn.answers[i] = new Answer(turn.answers[i].title, turn.answers[i].body);
  run(turn, which.map((i) => turn.answers[i]));
}

async function run(turn, answers) {
  const controller = new AbortController();
  const inTurn = $("in-turn").checked;
  const work = async () => {
    for (const answer of inTurn ? answers : []) await fill(answer, controller.signal);
    if (!inTurn) await Promise.all(answers.map((answer) => fill(answer, controller.signal)));
  };
  running = { stop: () => controller.abort(), done: work() };
  showRunning(true);
  draw();
  await running.done;
  running = null;
  showRunning(false);
  draw();
  tell(turn);
}

// Everything that can go wrong ends in the answer, where it is shown.
async function fill(answer, signal) {
  if (signal.aborted) return answer.end("stopped");
  answer.begin();
  try {
    for await (const chunk of complete(answer.body, key, signal)) {
      answer.take(chunk);
      drawSoon();
    }
    answer.end("whole");
  } catch (error) {
    if (signal.aborted) answer.end("stopped");
    else answer.end("failed", error);
    if (error.status === 401) askKey();
  }
  return drawSoon();
}

function showRunning(is) {
  const had = [$("send"), $("stop")].includes(document.activeElement);
  $("send").hidden = is;
  $("stop").hidden = !is;
  if (had) (is ? $("stop") : $("prompt")).focus();
}

async function newConversation() {
  running?.stop();
  await running?.done;
  turns = [];
  $("turns").replaceChildren();
  $("welcome").hidden = models.length === 0;
  draw();
  $("prompt").focus();
}

// Drawing

let drawing = 0;
function drawSoon() {
  drawing ||= requestAnimationFrame(draw);
}

function draw() {
  cancelAnimationFrame(drawing);
  drawing = 0;
  const view = $("conversation");
  const atEnd = view.scrollHeight - view.scrollTop - view.clientHeight < 60;
  const turn = turns.at(-1);
  if (turn) drawTurn(turn);
  heads.forEach((head, i) => drawHead(head, turn?.answers[i]));
  if (atEnd) view.scrollTop = view.scrollHeight;
}

function drawTurn({ element, answers, sameHistory }) {
  const [left, right] = answers;
  const result = right && drawVerdict(element, left, right, sameHistory);
  [...element.querySelectorAll(".answer")].forEach((place, i) => {
    drawAnswer(place, answers[i], result?.parted ? result.at : null);
    place.querySelector(".again").hidden = running !== null || !["failed", "stopped"].includes(answers[i].state);
  });
  const before = turns.at(-2);
  for (const again of before?.element.querySelectorAll(".again") ?? []) again.hidden = true; // it has been talked past
}

function drawHead(head, answer) {
  const texts = answer ? written(answer.numbers) : {};
  for (const place of head.querySelectorAll("[data-of]")) {
    const [number, unit] = texts[place.dataset.of] ?? ["–", ""];
    if (!place.lastElementChild) {
      place.replaceChildren(document.createElement("span"), " ", document.createElement("small"));
    }
    setText(place.firstElementChild, String(number));
    setText(place.lastElementChild, unit);
    if (place.dataset.of === "accepted") place.parentElement.hidden = number === "–";
  }
}

// What became of a turn, for those who do not see it.
function tell(turn) {
  const end = (answer) => answer.error?.message ?? `${answer.numbers.tokens ?? 0} tokens`;
  const ends = turn.answers.map((answer) => `${answer.title}: ${end(answer)}`);
  $("status").textContent = `${turn.element.querySelector(".verdict").textContent}. ${ends.join(". ")}`;
}

// What the reader does

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send($("prompt").value);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send($("prompt").value);
});
addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (running) running.stop();
  else openSettings(false);
});
$("stop").addEventListener("click", () => running?.stop());
$("new").addEventListener("click", newConversation);
$("settings-button").addEventListener("click", () => openSettings($("settings").hidden));
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey();
});
$("notice").querySelector("button").addEventListener("click", loadModels);
for (const button of $("welcome").querySelectorAll("button")) {
  button.addEventListener("click", () => send(button.textContent));
}
$("separate").addEventListener("change", () => {
  for (const name of separate() ? Object.keys(SETTINGS) : []) field(1, name).value = field(0, name).value;
  shape();
});
$("settings").addEventListener("input", shape);
for (const select of selects) select.addEventListener("change", () => { select.title = select.value; });

shape();
await loadModels();
if (document.activeElement === document.body) $("prompt").focus();
