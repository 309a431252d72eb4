"use strict";
/* The page's engine without a server: the runtime in WebAssembly, in a worker. offline-runtime.js comes before it and
 * sets window.mixkabrnOffline = {worker: its source, relaxed, simd, scalar: base64}; a page from a disk may load nothing. */

class OfflineEngine {
  constructor(parts) {
    this.calls = new Map();
    this.count = 0;
    this.file = null;
    this.worker = new Worker(URL.createObjectURL(new Blob([parts.worker], { type: "text/javascript" })));
    this.worker.onmessage = ({ data }) => this.hear(data);
    this.worker.onerror = (event) => this.calls.forEach(({ reject }) => reject(new Error(event.message || "The worker cannot start.")));
    this.started = this.ask({ kind: "start", modules: parts });
    this.opened = new Promise((resolve) => { this.resolveOpened = resolve; });
  }
  ask(message, onText) {
    const id = ++this.count;
    return new Promise((resolve, reject) => {
      this.calls.set(id, { resolve, reject, onText });
      this.worker.postMessage({ id, ...message });
    });
  }
  hear({ id, piece, error, result }) {
    const call = this.calls.get(id);
    if (piece !== undefined) { call.onText(piece); return; }
    this.calls.delete(id);
    if (error !== undefined) call.reject(new Error(error));
    else call.resolve(result);
  }
  async open(file) {
    this.info = null;
    await this.started;
    this.info = await this.ask({ kind: "open", file });
    this.file = file;
    this.resolveOpened();
  }
  async describe() {
    await this.opened;
    const millions = (this.info.parameters / 1e6).toFixed(1);
    return {
      name: this.file.name.replace(/\.mkb$/, ""),
      detail: `${millions} M weights · WebAssembly (${this.info.kernels})`,
      about: "The model runs in this page. What you write goes nowhere.",
      maxTokens: 4096,
    };
  }
  generate(messages, settings, onText, signal) { return this.answer({ kind: "generate", messages }, settings, onText, signal); }
  complete(text, settings, onText, signal) { return this.answer({ kind: "complete", text }, settings, onText, signal); }
  async answer(question, settings, onText, signal) {
    if (!this.info) throw new Error("Choose a model file first.");
    const { temperature, topP, maxTokens } = settings;
    const stop = () => this.worker.postMessage({ kind: "stop" });
    signal?.addEventListener("abort", stop);
    try {
      const result = await this.ask({ ...question, settings: { temperature, topP, maxTokens } }, onText);
      if (signal?.aborted) throw new DOMException("stopped", "AbortError");
      return result;
    } finally {
      signal?.removeEventListener("abort", stop);
    }
  }
}

/* A bar above the page takes the model file; so does dropping it anywhere. */
function addFileBar(engine) {
  const input = Object.assign(document.createElement("input"), { type: "file", id: "model-file", accept: ".mkb" });
  const label = Object.assign(document.createElement("label"), { textContent: "Model file " });
  const note = Object.assign(document.createElement("span"), { id: "model-note" });
  const bar = Object.assign(document.createElement("div"), { id: "model-bar" });
  bar.style.cssText = "position:fixed;top:.5rem;left:50%;transform:translateX(-50%);z-index:9;padding:.5rem .75rem;border-radius:.5rem;background:Canvas;color:CanvasText;border:1px solid GrayText;font:14px system-ui;max-width:90vw";
  note.setAttribute("role", "status");
  label.append(input);
  bar.append(label, note);
  document.body.append(bar);
  const open = async (file) => {
    if (!file) return;
    note.textContent = `Loading ${file.name} …`;
    try {
      await engine.open(file);
      note.textContent = "";
      bar.hidden = true;
      if (window.connect) window.connect();
    } catch (error) {
      note.textContent = ` ${error.message}`;
      bar.hidden = false;
    }
  };
  input.onchange = () => open(input.files[0]);
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => { event.preventDefault(); open(event.dataTransfer.files[0]); });
}

window.makeEngine = () => {
  const engine = new OfflineEngine(window.mixkabrnOffline);
  if (document.body) addFileBar(engine);
  else addEventListener("DOMContentLoaded", () => addFileBar(engine));
  return engine;
};
