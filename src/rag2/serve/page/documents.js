// The drawer: documents as a list, one with the cited place marked, and the form to change it.

import { documents, Failure, json, token } from "/page/api.js";

export class Drawer {
  /** `changed(rag2)` hears of every change; `again()` asks the last question once more. */
  constructor(dialog, { namespace, within, changed, again }) {
    Object.assign(this, { dialog, namespace, within, changed, drafts: new Map() });
    this.find = (selector) => dialog.querySelector(selector);
    this.form = this.find(".editor");
    this.fields = this.form.elements;
    const on = (selector, act) => (this.find(selector).onclick = () => this.attempt(act));
    on(".close", () => dialog.close());
    on(".back", () => this.list());
    on(".more", () => this.more());
    on(".new", () => this.edit({ id: "", title: "", text: "" }));
    on("article .edit", () => this.edit(this.document));
    on(".cancel", () => this.cancel());
    on(".delete", () => this.remove());
    on(".again", () => (dialog.close(), again()));
    this.find(".delete").onblur = () => this.ask(false);
    this.form.oninput = () => this.drafts.set(this.key(), this.typed());
    this.find(".find").onsubmit = (event) => (event.preventDefault(), this.attempt(() => this.list()));
    this.form.onsubmit = (event) => (event.preventDefault(), this.attempt(() => this.save()));
    this.find(".token input").oninput = (event) => token.set(event.target.value.trim());
  }

  /** Open with the list, or with a citation's document, to read or to edit it. */
  open(citation, edit = false) {
    this.dialog.showModal();
    this.attempt(() => (citation ? this.load(citation.document, citation, edit) : this.list()));
  }

  /** Do it, and say in the drawer why it failed; what was still being read is given up. */
  async attempt(act) {
    this.reading?.abort();
    this.reading = new AbortController();
    this.find(".notice").textContent = this.find(".error").textContent = "";
    try {
      await act();
    } catch (error) {
      if (error.name === "AbortError") return;
      if (!(error instanceof Failure)) throw error;
      this.find(".error").textContent = error.message;
      if (error.status === 401) this.wantToken();
    }
  }

  /** Show one of the three parts under a heading. */
  turn(part, heading) {
    for (const one of [".list", "article", ".editor"]) this.find(one).hidden = one !== part;
    this.find(".back").hidden = part === ".list";
    this.find(".new").hidden = part !== ".list";
    this.find(".token").hidden = true;
    this.find(".again").hidden = true;
    this.find("#heading").textContent = heading;
    this.find("#heading").focus();
  }

  async list() {
    const query = this.find(".find input").value.trim();
    this.find("ul").replaceChildren();
    this.turn(".list", "Documents");
    this.find(".more").hidden = true;
    if (!query) return this.more();
    const body = { query, k: 12, namespaces: this.within() };
    const found = await json("POST", "/v1/retrieve", body, this.reading.signal);
    for (const row of found.results) this.entry(row.document, row.title, row.text, row);
    this.find(".notice").textContent = found.results.length ? "" : "Nothing was found.";
  }

  async more() {
    const after = this.find("ul").lastElementChild?.dataset.id;
    const page = await this.get("", { after, limit: 50 });
    for (const row of page.data) this.entry(row.id, row.title, `${row.characters} characters`);
    this.find(".more").hidden = !page.has_more;
  }

  entry(id, title, line, citation) {
    const [item, button, note] = ["li", "button", "span"].map((name) => document.createElement(name));
    button.textContent = title || id;
    note.textContent = citation ? line : `${id} · ${line}`;
    note.className = "soft";
    button.type = "button";
    button.className = "plain";
    button.onclick = () => this.attempt(() => this.load(id, citation));
    button.append(note);
    item.dataset.id = id;
    item.append(button);
    this.find("ul").append(item);
  }

  get(id, query, namespace = this.namespace()) {
    return json("GET", documents(id, { ...query, namespace }), undefined, this.reading.signal);
  }

  async load(id, citation, edit = false, namespace = citation?.namespace) {
    this.turn("article", id);
    this.find(".text").textContent = "";
    const found = await this.get(id, {}, namespace);
    if (edit) this.edit(found);
    else this.show(found, citation);
  }

  /** The text with the cited characters marked, where they are still what was cited. */
  show(found, citation) {
    this.document = found;
    this.turn("article", found.title || found.id);
    this.find("article .soft").textContent = `${found.id} · ${[...found.text].length} characters`;
    // The server counts code points, as Python does; JavaScript counts UTF-16 units.
    const points = [...found.text];
    const cut = (start, end) => points.slice(start, end).join("");
    const text = this.find(".text");
    text.textContent = found.text;
    if (!citation) return;
    const mark = document.createElement("mark");
    mark.textContent = cut(citation.start, citation.end);
    if (mark.textContent !== citation.text) {
      this.find(".notice").textContent = "The document has changed since it was cited.";
      return;
    }
    text.replaceChildren(cut(0, citation.start), mark, cut(citation.end));
    mark.scrollIntoView({ block: "center" });
  }

  /** The form with the document, or with what was typed and not saved. */
  edit(found) {
    this.document = found;
    this.turn(".editor", found.id ? `Edit ${found.title || found.id}` : "New document");
    const draft = this.drafts.get(this.key());
    for (const name of ["id", "title", "text"]) this.fields[name].value = (draft ?? found)[name];
    if (draft) this.find(".notice").textContent = "What you had typed is here again.";
    this.fields.id.readOnly = Boolean(found.id);
    this.find(".token").hidden = Boolean(token.get());
    this.fields[found.id ? "text" : "id"].focus();
  }

  /** The namespace of what is open: a citation's may be another than the chosen one. */
  home() { return this.document.namespace ?? this.namespace(); }
  /** What was typed is of one document: ids are of a namespace. */
  key() { return JSON.stringify([this.home(), this.document.id]); }

  cancel() {
    this.drafts.delete(this.key());
    return this.document.id ? this.show(this.document) : this.list();
  }

  typed() {
    return Object.fromEntries(["id", "title", "text"].map((name) => [name, this.fields[name].value]));
  }

  async save() {
    const document = { ...this.typed(), metadata: this.document.metadata };
    const [{ signal }, namespace, key] = [this.reading, this.home(), this.key()];
    if (!this.document.id && (await this.exists(document.id))) {
      throw new Failure(0, `There is a document ${document.id} already. Open it to change it.`);
    }
    const { rag2, chunks, unchanged } = await json("POST", "/v1/documents", { documents: [document], namespace });
    this.drafts.delete(key);
    this.changed(rag2);
    if (signal.aborted) return; // the drawer shows something else by now
    await this.load(document.id, undefined, false, namespace);
    this.say(unchanged ? "Nothing was different." : `Saved as version ${rag2.version}: ${chunks} passages.`);
  }

  async exists(id) {
    try {
      return Boolean(await this.get(id));
    } catch (error) {
      if (error.status === 404) return false;
      throw error;
    }
  }

  /** Tell what was done, and offer to ask again. */
  say(line) {
    this.find(".notice").textContent = line;
    this.find(".again").hidden = false;
    this.find(".again").focus();
  }

  /** Delete on the second press. */
  async remove() {
    if (!this.asked) return this.ask(true);
    this.ask(false);
    const { id } = this.document;
    const { rag2 } = await json("DELETE", documents(id, { namespace: this.home() }));
    this.changed(rag2);
    await this.list();
    this.find(".notice").textContent = `Deleted ${id}; this is version ${rag2.version}.`;
  }

  ask(asked) {
    this.asked = asked;
    this.find(".delete").textContent = asked ? "Really delete?" : "Delete";
  }

  wantToken() {
    this.find(".token").hidden = false;
    this.find(".token input").focus();
  }
}
