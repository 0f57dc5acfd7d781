// Says and draws where two answers part.

import { compare, countCharacters } from "./text.js";
import { setText } from "./answer.js";

const SIDES = ["left", "right"];

// Draws the verdict of a turn and returns the comparison.
export function drawVerdict(element, left, right, sameHistory) {
  const result = compare(left, right);
  const [strong, rest] = words(result, left, right);
  const verdict = element.querySelector(".verdict");
  if (!verdict.firstChild) verdict.append(document.createElement("b"), document.createElement("span"));
  setText(verdict.firstChild, strong);
  setText(verdict.lastChild, rest + (sameHistory || !strong ? "" : " · what was said before differs already"));
  drawThread(element.querySelector("svg"), result, left.text.length, right.text.length);
  return result;
}

// [what is so, the details]
function words(result, left, right) {
  const characters = countCharacters(left.text.slice(0, result.at));
  if (result.parted) {
    const where = `Parted at ${tokens(left, right, result.at)}`;
    const end = result.endedFirst === null ? "" : `, where the ${SIDES[result.endedFirst]} answer ends`;
    return [where, `, character ${characters + 1}${end}`];
  }
  if (characters === 0) return ["", ""];
  const count = `, ${characters} character${characters === 1 ? "" : "s"}`;
  if (!left.over || !right.over) return ["Identical so far", count];
  const whole = left.state === "whole" && right.state === "whole" && left.text === right.text;
  return [whole ? "Identical" : "Identical as far as both went", count];
}

function tokens(left, right, at) {
  const [one, other] = [left, right].map((answer) => answer.tokenAt(at));
  const about = one.exact && other.exact ? "" : "about ";
  return one.number === other.number
    ? `${about}token ${one.number}`
    : `${about}token ${one.number} on the left, ${other.number} on the right`;
}

// Both answers as one thread from left to right, as long as their texts, which parts where they do.
function drawThread(svg, { at, parted }, left, right) {
  const unit = left && right ? 1000 / Math.max(left, right) : 0; // one alone is not compared
  const fork = at * unit, bend = 28;
  const branch = (length, height) => {
    const end = length * unit;
    if (end <= fork) return "";
    if (!parted) return `M${fork} 10H${end}`;
    const turn = Math.min(fork + bend, 1000), middle = (fork + turn) / 2;
    return `M${fork} 10C${middle} 10 ${middle} ${height} ${turn} ${height}` + (end > turn ? `H${end}` : "");
  };
  svg.querySelector(".trunk").setAttribute("d", at > 0 ? `M0 10H${fork}` : "");
  svg.querySelector(".left").setAttribute("d", branch(left, 4));
  svg.querySelector(".right").setAttribute("d", branch(right, 16));
}
