// The page: a question, one or two arms that answer it, and what was asked before.

import { Failure, json, takeToken } from "/page/api.js";
import { Arm } from "/page/arm.js";
import { Drawer } from "/page/documents.js";

const at = (id) => document.getElementById(id);
const question = at("question");
const go = at("go");
const spaces = document.querySelector("#namespace select");
const namespace = () => spaces.value;
const within = () => (spaces.length > 1 ? [spaces.value] : undefined);
const arms = [];
let model;
let running = null;

takeToken();
addEventListener("hashchange", takeToken);
await start();

async function start() {
  try {
    [model] = (await json("GET", "/v1/models")).data;
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    at("failure").textContent = error.message;
    if ([0, 503].includes(error.status)) setTimeout(start, 1000);
    return;
  }
  const facts = model.rag2;
  at("failure").textContent = "";
  for (const name of facts.namespaces) spaces.add(new Option(name || "(none)", name));
  at("namespace").hidden = facts.namespaces.length < 2;
  document.title = `${model.id} · RAG 2.0`;
  at("lead").textContent = `Ask ${model.id}`;
  place(facts);
  const drawer = new Drawer(at("drawer"), { namespace, within, changed: place, again: ask });
  const open = (citation, edit) => drawer.open(citation, edit);
  arms.push(new Arm("A", facts, facts.k, open), new Arm("B", facts, 0, open));
  at("arms").append(...arms.map((arm) => arm.root), ...arms.map((arm) => arm.sources));
  compare(false);
  at("documents").onclick = () => open();
  at("compare").onclick = () => compare(!comparing());
}

function place(facts) {
  at("place").textContent = `generation ${facts.generation} · version ${facts.version}`;
}

const comparing = () => at("compare").getAttribute("aria-pressed") === "true";

function compare(on) {
  at("compare").setAttribute("aria-pressed", on);
  at("arms").classList.toggle("two", on);
  arms[1].k.disabled = !on;
}

/** Put the question to every arm that is shown; a newer question ends an older one. */
async function ask() {
  const text = question.value.trim();
  if (!text || !arms.length || !at("ask").reportValidity()) return;
  running?.abort();
  const mine = (running = new AbortController());
  go.textContent = "Stop";
  const asked = comparing() ? arms : arms.slice(0, 1);
  const { signal } = mine;
  const results = await Promise.all(asked.map((arm) => arm.ask(text, model.id, within(), signal)));
  remember(text, results);
  if (running !== mine) return;
  running = null;
  go.textContent = "Ask";
  const newest = results.findLast((result) => result.facts);
  if (newest) place(newest.facts);
}

/** A line of the history; pressing it shows what was answered then. */
function remember(text, results) {
  const [item, button, said] = ["li", "button", "span"].map((name) => document.createElement(name));
  const line = ({ text, facts, error, note }) =>
    [text.trim(), error || note, facts && `v${facts.version}`].filter(Boolean).join(" · ");
  button.type = "button";
  button.className = "plain";
  button.textContent = text;
  said.className = "soft";
  said.textContent = results.map(line).join("  |  ");
  button.append(said);
  button.onclick = () => {
    running?.abort();
    question.value = text;
    compare(results.length === 2);
    results.forEach((result, place) => arms[place].show(result));
    scrollTo({ top: 0 });
    question.focus();
  };
  item.append(button);
  document.querySelector("#history ol").prepend(item);
  at("history").hidden = false;
}

at("ask").onsubmit = (event) => {
  event.preventDefault();
  ask();
};
go.onclick = (event) => {
  // Enter in a field presses this button, too; there it asks anew.
  const meant = event.detail > 0 || document.activeElement === go;
  if (!running || !meant) return;
  event.preventDefault();
  running.abort();
};
question.onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
};
addEventListener("keydown", (event) => {
  if (at("drawer").open) return;
  if (event.key === "Escape") running?.abort();
  if (event.key === "/" && !event.target.matches("input, textarea, select")) {
    event.preventDefault();
    question.focus();
  }
});
