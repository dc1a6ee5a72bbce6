// The browser of single questions. All foreign text goes through textContent, never through markup.
"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const { arms, questions, passages } = data;
  const inputs = ["search", "group", "right", "wrong", "disagree"].map(byId);
  const [search, group, right, wrong, disagree] = inputs;
  let shown = questions;

  function make(tag, properties = {}, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  }

  const number = (value, digits) =>
    value === null ? "−∞" : value.toFixed(digits).replace("-", "−");

  const words = new Map(
    questions.map((q) => [q, [q.id, q.question, ...q.choices].join("\n").toLowerCase()]),
  );

  // Not every arm picked the same choice.
  const differs = (q) => new Set(q.arms.map((answer) => answer.pick)).size > 1;

  function fits(q) {
    const wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const [key, label] = group.value ? JSON.parse(group.value) : [];
    return (
      wanted.every((word) => words.get(q).includes(word)) &&
      (!group.value || q.groups[key] === label) &&
      (!right.value || q.arms[+right.value].right) &&
      (!wrong.value || !q.arms[+wrong.value].right) &&
      (!disagree.checked || differs(q))
    );
  }

  const current = () => {
    const found = /^#q=(\d+)$/.exec(location.hash);
    return found ? +found[1] : null;
  };

  function list() {
    shown = questions.filter(fits);
    byId("count").textContent = `${shown.length} of ${questions.length} questions`;
    byId("list").replaceChildren(
      ...shown.map((q) => {
        const link = make("a", { href: `#q=${q.number}` });
        link.append(make("small", { textContent: `${q.number} ` }), q.question);
        return make("li", {}, link);
      }),
    );
    mark();
  }

  function mark() {
    const here = `#q=${current()}`;
    for (const link of byId("list").querySelectorAll("a")) {
      if (link.getAttribute("href") !== here) link.removeAttribute("aria-current");
      else link.setAttribute("aria-current", "true");
    }
  }

  function answers(q) {
    const choice = (text, index) => {
      const head = make("th", { scope: "col", className: "choice" }, text);
      if (index === q.answer) head.append(make("span", { className: "good" }, " ✓ right"));
      return head;
    };
    const head = make("tr", {}, make("th", { scope: "col" }, "arm"), ...q.choices.map(choice));
    const rows = q.arms.map((answer, index) => {
      // Shares among the choices, exp(logp) normalised, are the bars behind the numbers.
      const top = Math.max(...answer.logp.map((logp) => logp ?? -Infinity));
      const share = answer.logp.map((logp) => (logp === null ? 0 : Math.exp(logp - top)));
      const total = share.reduce((sum, value) => sum + value, 0);
      const cells = answer.logp.map((logp, option) => {
        const cell = make("td", { className: "logp" }, number(logp, 2));
        cell.style.setProperty("--share", `${(100 * share[option]) / total}%`);
        if (option === answer.pick) {
          const verdict = answer.right ? "good" : "bad";
          const text = answer.right ? " ● right" : " ● wrong";
          cell.append(make("span", { className: verdict }, text));
        }
        return cell;
      });
      return make("tr", {}, make("th", { scope: "row" }, arms[index]), ...cells);
    });
    const table = make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows));
    const box = make("div", { className: "scroll", tabIndex: 0 }, table);
    box.setAttribute("role", "region");
    box.setAttribute("aria-label", "Log-likelihood of each choice, by arm");
    return box;
  }

  function chunks(q) {
    const opened = Math.max(0, arms.indexOf("joint"));
    return q.arms.flatMap((answer, index) => {
      if (!answer.retrieved.length) return [];
      const items = answer.retrieved.map(([chunk, score, posterior]) => {
        const weights = [`chunk ${chunk}`, `score ${number(score, 2)}`];
        if (posterior !== null) weights.push(`posterior ${posterior.toFixed(3)}`);
        return make(
          "li",
          {},
          make("span", { className: "weights" }, weights.join(" · ")),
          make("p", { className: "passage" }, passages[chunk] ?? "(its text was not at hand)"),
        );
      });
      const count = items.length === 1 ? "1 passage" : `${items.length} passages`;
      const summary = make("summary", {}, `${arms[index]}: ${count}`);
      const block = make("details", {}, summary, make("ol", {}, ...items));
      block.open = index === opened;
      return [block];
    });
  }

  function pager(q) {
    const place = shown.indexOf(q);
    const step = (text, other) => (other ? [make("a", { href: `#q=${other.number}` }, text)] : []);
    const links = place < 0 ? [] : [
      ...step("← previous", shown[place - 1]),
      ...step("next →", shown[place + 1]),
    ];
    return make("div", { className: "pager" }, ...links);
  }

  function detail() {
    const wanted = current();
    const q = wanted === null ? shown[0] : questions.find((each) => each.number === wanted);
    const place = byId("question");
    if (!q) {
      const text = wanted === null ? "No question fits." : `Question ${wanted} is not in this page.`;
      place.replaceChildren(make("p", { className: "note" }, text));
      return;
    }
    const groups = Object.entries(q.groups).map(([key, label]) => `${key}: ${label}`);
    const found = chunks(q);
    const prompt = make("details", {}, make("summary", {}, "prompt without passages"));
    prompt.append(make("pre", {}, q.prompt));
    place.replaceChildren(
      pager(q),
      make("h3", {}, q.question),
      make("small", {}, [`question ${q.number}`, q.id, ...groups].join(" · ")),
      make("h3", {}, "Log-likelihoods"),
      answers(q),
      ...(found.length ? [make("h3", {}, "Retrieved passages"), ...found] : []),
      make("h3", {}, "Prompt"),
      prompt,
    );
    place.dataset.number = q.number;
    mark();
  }

  function options() {
    const groups = new Map();
    for (const q of questions) {
      for (const [key, label] of Object.entries(q.groups)) {
        groups.set(key, (groups.get(key) ?? new Set()).add(label));
      }
    }
    for (const [key, labels] of groups) {
      if (labels.size < 2 || labels.size > 30) continue; // no choice, or one for each question
      for (const label of [...labels].sort()) {
        const value = JSON.stringify([key, label]);
        group.append(make("option", { value, textContent: `${key}: ${label}` }));
      }
    }
    arms.forEach((arm, index) => {
      for (const select of [right, wrong]) {
        select.append(make("option", { value: index, textContent: arm }));
      }
    });
    group.parentElement.hidden = group.options.length < 2;
  }

  options();
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  for (const input of inputs) {
    input.addEventListener("input", () => {
      list();
      if (!shown.some((q) => q.number === +byId("question").dataset.number) && shown.length) {
        history.replaceState(null, "", `#q=${shown[0].number}`);
      }
      detail();
    });
  }
  addEventListener("hashchange", detail);
  byId("filters").hidden = byId("panes").hidden = false;
  list();
  detail();
  if (current() !== null) byId("browser").scrollIntoView();
})();
