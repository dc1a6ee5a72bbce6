// One way to answer: its K and reading, the answer as it streams, and the sources it stands on.

import { events, Failure, request } from "/page/api.js";

const READINGS = {
  marginal: "each passage alone, answers weighed",
  token: "each passage alone, tokens weighed",
  concat: "all passages in one prompt",
};

export class Arm {
  /** `model` is what the server says of itself; `open(citation, edit)` shows a document. */
  constructor(name, model, k, open) {
    this.root = copy("arm");
    this.sources = copy("sources");
    this.open = open;
    this.temperature = model.temperature;
    this.find = (selector) => this.root.querySelector(selector);
    this.root.setAttribute("aria-label", `Answer ${name}`);
    this.sources.setAttribute("aria-label", `Sources of answer ${name}`);
    for (const part of [this.root, this.sources]) part.classList.add(name.toLowerCase());
    this.find("h2").textContent = name;
    this.sources.querySelector("h3 span").textContent = name;
    this.k = this.find("input");
    this.reading = this.find("select");
    for (const reading of model.readings) this.reading.add(new Option(reading));
    this.settle(k, model.reading);
    for (const field of [this.k, this.reading]) field.oninput = () => this.settle();
  }

  /** Show what K and reading mean together. */
  settle(k = this.k.value, reading = this.reading.value) {
    this.k.value = k;
    this.reading.value = reading;
    const closed = Number(k) === 0;
    this.reading.disabled = closed;
    this.find(".settings .soft").textContent = closed ? "closed book" : READINGS[reading];
  }

  /** Stream an answer; returns what it came to, which `show` takes. Never throws. */
  async ask(question, model, namespaces, signal) {
    const rag2 = { k: Number(this.k.value), reading: this.reading.value, namespaces };
    const result = { k: rag2.k, reading: rag2.reading, text: "", citations: [], cited: 0, note: "", error: "" };
    this.signal = signal;
    const said = this.start();
    try {
      const messages = [{ role: "user", content: question }];
      const body = { model, messages, stream: true, rag2 };
      const response = await request("POST", "/v1/chat/completions", body, signal);
      for await (const event of events(response)) {
        const { delta, finish_reason: finish } = event.choices[0] ?? {};
        if (delta?.content && this.signal === signal) said.append(delta.content);
        result.text += delta?.content ?? "";
        if (delta?.citations) result.citations = delta.citations;
        if (delta?.annotations) result.cited = delta.annotations.length;
        if (event.rag2) result.facts = event.rag2;
        if (finish === "length") result.note = "cut at the limit of tokens";
      }
    } catch (error) {
      if (error.name === "AbortError") result.note = "stopped";
      else if (error instanceof Failure) result.error = error.message;
      else throw error;
    }
    if (this.signal === signal) this.show(result); // else something newer is shown
    return result;
  }

  /** An empty answer to write into; the sources of the last one stay until there are others. */
  start() {
    this.busy(true);
    for (const place of [".error", ".meta"]) this.find(place).textContent = "";
    this.find(".answer").replaceChildren();
    return this.find(".answer");
  }

  busy(on) {
    for (const part of [this.root, this.sources]) part.setAttribute("aria-busy", on);
  }

  /** Show a result, the newest or one of before. */
  show(result) {
    this.signal = null;
    this.settle(result.k, result.reading);
    this.busy(false);
    const { facts, citations, k } = result;
    const text = result.text.trim() || (facts ? "(an empty answer)" : "");
    this.find(".answer").textContent = text;
    this.find(".error").textContent = result.error;
    this.find(".meta").textContent = [
      result.note,
      facts && `p(y|x) ${Math.exp(facts.logp).toPrecision(2)}`,
      facts && (k ? `${citations.length} passages` : "closed book"),
      facts?.dropped && `${facts.dropped} had no room`,
      facts && `${Math.round(facts.seconds.total * 1000)} ms`,
      facts && `version ${facts.version}`,
    ].filter(Boolean).join(" · ");
    const exponentials = citations.map((c) => Math.exp((c.score - citations[0].score) / this.temperature));
    const all = exponentials.reduce((sum, value) => sum + value, 0);
    const rows = citations.map((c, at) => ({ ...c, prior: exponentials[at] / all }));
    rows.sort((a, b) => b.posterior - a.posterior || b.score - a.score);
    const cards = rows.map((row) => this.card(row));
    this.sources.querySelector("ol").replaceChildren(...cards);
    this.sources.hidden = !rows.length;
    this.sources.querySelector(".legend").hidden = rows.some((row) => row.posterior === null);
    this.cite(cards.slice(0, result.cited));
  }

  /** Numbers behind the answer, each of which leads to a card. */
  cite(cards) {
    const numbers = cards.map((card, at) => {
      const number = document.createElement("button");
      number.type = "button";
      number.className = "cite";
      number.textContent = at + 1;
      number.setAttribute("aria-label", `Source ${at + 1}`);
      number.onclick = () => card.querySelector(".title").focus();
      return number;
    });
    this.find(".answer").append(...numbers);
  }

  card(row) {
    const card = copy("card");
    const find = (selector) => card.querySelector(selector);
    const told = row.posterior !== null;
    find(".title").textContent = row.title || row.document;
    find(".id").textContent = row.title ? row.document : "";
    find("b").textContent = told ? percent(row.posterior) : "";
    find(".passage").textContent = row.text;
    find(".foot span").textContent = `prior ${percent(row.prior)} · score ${row.score.toFixed(2)}`;
    find(".bar").hidden = find(".head .soft:not(.id)").hidden = !told;
    find(".bar").style.setProperty("--share", row.posterior ?? 0);
    find(".bar").style.setProperty("--prior", row.prior);
    find(".title").onclick = find(".show").onclick = () => this.open(row, false);
    find(".edit").onclick = () => this.open(row, true);
    for (const name of [".show", ".edit"]) {
      find(name).setAttribute("aria-label", `${find(name).textContent}: ${row.title || row.document}`);
    }
    return card;
  }
}

const copy = (id) => document.getElementById(id).content.cloneNode(true).firstElementChild;
const percent = (share) => `${(100 * share).toFixed(1)} %`;
