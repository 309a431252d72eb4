"use strict";
/* The runtime in a worker of its own. It is asked {id, kind: "start" | "open" | "generate" | "complete" | "stop", …} and answers
 * {id, piece}, {id, result} or {id, error}. Node runs the same class in tests. */

const NO_TOKEN = 0xffffffff, ERROR_BYTES = 256, CHUNK = 64, CACHED_BYTES = 256 << 20, ATTENTION_TOKENS = 4096;

/* What the C library asks of a system: a clock, an empty environment, and nowhere to write. */
function makeSystem(memory) {
  const BADF = 8;
  const known = {
    clock_time_get(_id, _precision, at) {
      new DataView(memory().buffer).setBigUint64(at, BigInt(Math.round(performance.now() * 1e6)), true);
      return 0;
    },
    environ_sizes_get(count, bytes) {
      const view = new DataView(memory().buffer);
      view.setUint32(count, 0, true);
      view.setUint32(bytes, 0, true);
      return 0;
    },
    environ_get: () => 0,
    proc_exit(code) { throw new Error(`The runtime ended with ${code}.`); },
  };
  return new Proxy({}, { get: (_, name) => known[name] ?? (() => BADF) });
}

/* The best that this browser computes, by modules with one instruction of each: a product of bytes, a count of bits. The
 * product is tried: Node 20, which has it behind a flag, takes the other factor as the signed one. */
function chooseKind() {
  const begin = [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 127, 3, 2, 1, 0, 7, 5, 1, 1, 97, 0, 0, 10];
  const splat = (value) => [65, value, 253, 15], lane = [253, 27, 0, 11];
  const relaxed = [22, 1, 20, 0, ...splat(127), ...splat(2), ...splat(0), 253, 147, 2, ...lane];
  const simd = [13, 1, 11, 0, ...splat(0), 253, 98, ...lane];
  const compute = (code) => {
    try { return new WebAssembly.Instance(new WebAssembly.Module(new Uint8Array([...begin, ...code]))).exports.a(); } catch { return null; }
  };
  return compute(relaxed) === -8 ? "relaxed" : compute(simd) === 0 ? "simd" : "scalar";
}

class Runtime {
  constructor(module) {
    const names = WebAssembly.Module.imports(module).map(({ name }) => name);
    const system = makeSystem(() => this.c.memory);
    const imports = Object.fromEntries(names.map((name) => [name, system[name]]));
    this.c = new WebAssembly.Instance(module, { wasi_snapshot_preview1: imports }).exports;
    this.c._initialize();
    this.model = this.context = this.bytes = 0;
    this.states = [];
    this.scratch = this.allocate(512);
  }

  allocate(bytes) {
    const at = this.c.malloc(bytes) >>> 0;
    if (!at) throw new Error("The browser has no memory for that; use a smaller model.");
    return at;
  }
  view(at, bytes) { return new Uint8Array(this.c.memory.buffer, at >>> 0, bytes); }
  number(at) { return new DataView(this.c.memory.buffer).getUint32(at, true); }
  text(at, bytes) { return new TextDecoder().decode(this.view(at, bytes)); }
  check(status) {
    if (!status) return;
    const message = this.view(this.scratch, ERROR_BYTES);
    throw new Error(this.text(this.scratch, message.indexOf(0)));
  }

  /* Room for the file, which the caller fills before open(). */
  reserve(size) {
    this.close();
    this.bytes = this.allocate(size);
    this.size = size;
    return this.bytes;
  }
  open() {
    const { c, scratch } = this, out = scratch + ERROR_BYTES;
    this.check(c.mkb_model_open_memory(this.bytes, this.size, 1, out, scratch));
    this.model = this.number(out);
    c.mkb_model_info(this.model, out);
    const view = new DataView(c.memory.buffer, out);
    this.info = {
      vocabSize: view.getUint32(0, true), tokenizerSize: view.getUint32(4, true), documentToken: view.getUint32(8, true),
      parameters: Number(view.getBigUint64(40, true)), stateBytes: Number(view.getBigUint64(56, true)),
      attentionLayers: view.getUint32(72, true),
    };
    const template = c.mkb_model_template(this.model, out);
    this.chatml = this.text(template, this.number(out)).includes("<|im_start|>");
    this.check(c.mkb_context_create(this.model, 1, ATTENTION_TOKENS, out, scratch));
    this.context = this.number(out);
    this.logits = this.allocate(this.info.vocabSize * 4);
    const kernels = this.view(c.mkb_kernels(), 32);
    this.info.kernels = this.text(kernels.byteOffset, kernels.indexOf(0));
    return this.info;
  }
  close() {
    const { c } = this;
    if (this.context) c.mkb_context_destroy(this.context);
    if (this.model) c.mkb_model_close(this.model);
    for (const at of [this.bytes, this.logits]) if (at) c.free(at);
    this.model = this.context = this.bytes = this.logits = 0;
    this.states = [];
  }

  tokenize(text, special = false) {
    const bytes = new TextEncoder().encode(text), size = bytes.length;
    if (!size) return [];
    const from = this.allocate(size), to = this.allocate(size * 4);
    this.view(from, size).set(bytes);
    const count = this.c.mkb_tokenize(this.model, from, size, special ? 1 : 0, to, size) >>> 0;
    const ids = count === NO_TOKEN ? [] : [...new Uint32Array(this.c.memory.buffer, to, count)];
    this.c.free(from);
    this.c.free(to);
    if (count === NO_TOKEN) throw new Error("There is no memory for the text.");
    return ids;
  }
  tokenBytes(id) {
    const out = this.scratch + ERROR_BYTES, at = this.c.mkb_token_bytes(this.model, id, out);
    return this.view(at, this.number(out)).slice();
  }
  decode(ids, wanted = true) {
    const at = this.allocate(Math.max(4, ids.length * 4));
    new Uint32Array(this.c.memory.buffer, at, ids.length).set(ids);
    const status = this.c.mkb_decode(this.context, at, ids.length, wanted ? this.logits : 0, this.scratch);
    this.c.free(at);
    this.check(status);
  }
  setSampling({ temperature = 0, topP = 1, seed = 0n }) {
    const at = this.scratch + ERROR_BYTES, view = new DataView(this.c.memory.buffer, at);
    const fields = [temperature, 0, topP, 0, 1, 0];
    fields.forEach((value, i) => (i % 4 === 1 || i === 5 ? view.setUint32(4 * i, value, true) : view.setFloat32(4 * i, value, true)));
    view.setBigUint64(24, BigInt(seed), true);
    this.check(this.c.mkb_sampling_set(this.context, at, this.scratch));
  }
  sample() { return this.c.mkb_sample(this.context, this.logits) >>> 0; }

  /* States, by the tokens that they have read; the oldest go first. */
  keep(ids) {
    const size = this.c.mkb_state_bytes(this.context) >>> 0, at = this.allocate(size);
    const status = this.c.mkb_state_get(this.context, at, size, this.scratch);
    const state = this.view(at, size).slice();
    this.c.free(at);
    this.check(status);
    this.states = this.states.filter((kept) => kept.ids.length !== ids.length || kept.ids.some((id, i) => id !== ids[i]));
    this.states.push({ ids: ids.slice(), state });
    while (this.states.length > 1 && this.states.length * size > CACHED_BYTES) this.states.shift();
  }
  /* Go to the state that has read most of `ids`, but not all; returns how many. */
  restore(ids) {
    const fits = this.states.filter((kept) => kept.ids.length < ids.length && kept.ids.every((id, i) => id === ids[i]));
    const best = fits.sort((a, b) => b.ids.length - a.ids.length)[0];
    this.c.mkb_reset(this.context);
    if (!best) return 0;
    const at = this.allocate(best.state.length);
    this.view(at, best.state.length).set(best.state);
    const status = this.c.mkb_state_set(this.context, at, best.state.length, this.scratch);
    this.c.free(at);
    this.check(status);
    return best.ids.length;
  }

  /* As the server writes conversations. Special tokens are recognized only in the markup. */
  writeConversation(messages) {
    const ids = [this.info.documentToken];
    if (this.chatml) {
      for (const { role, content } of messages) {
        ids.push(...this.tokenize(`<|im_start|>${role}\n`, true), ...this.tokenize(content), ...this.tokenize("<|im_end|>\n", true));
      }
      ids.push(...this.tokenize("<|im_start|>assistant\n", true));
      return { ids, stops: ["<|im_end|>", "<|im_start|>"], trim: false };
    }
    let lead = "";
    for (const { role, content } of messages) {
      if (role === "system") { ids.push(...this.tokenize(`${content}\n\n`)); continue; }
      ids.push(...this.tokenize(lead + (role === "user" ? "User:" : "Assistant:")));
      if (content) ids.push(...this.tokenize(` ${content}`));
      lead = "\n";
    }
    ids.push(...this.tokenize(`${lead}Assistant:`));
    return { ids, stops: ["\nUser:"], trim: true };
  }

  /* `pause` is awaited now and then, and answers whether to stop. */
  generate(messages, settings, onText, pause) {
    return this.answer(this.writeConversation(messages), settings, onText, pause);
  }
  complete(text, settings, onText, pause) {
    return this.answer({ ids: [this.info.documentToken, ...this.tokenize(text)], stops: [], trim: false }, settings, onText, pause);
  }
  async answer({ ids, stops, trim }, settings, onText, pause) {
    const cached = this.restore(ids), result = { reason: "length", promptTokens: ids.length, cachedTokens: cached, completionTokens: 0, seconds: 0 };
    for (let at = cached; at < ids.length - 1; at += CHUNK) {
      this.decode(ids.slice(at, Math.min(at + CHUNK, ids.length - 1)), false);
      if (await pause()) return { ...result, reason: "stopped" };
    }
    this.keep(ids.slice(0, -1));
    this.setSampling({ seed: BigInt(Math.floor(Math.random() * 2 ** 52)), ...settings });
    this.decode(ids.slice(-1));
    const start = performance.now(), decoder = new TextDecoder(), read = ids.slice();
    let text = "", sent = 0;
    const show = (end) => {
      if (trim && !sent && !text.trim()) return;
      if (trim && !sent) sent = text.length - text.trimStart().length;
      if (end > sent) onText(text.slice(sent, end));
      sent = Math.max(sent, end);
    };
    while (result.completionTokens < settings.maxTokens) {
      const id = this.sample();
      if (id === NO_TOKEN) throw new Error("The model computes no numbers any more; its file may be damaged.");
      result.completionTokens += 1;
      if (id === this.info.documentToken) { result.reason = "stop"; break; }
      text += decoder.decode(this.tokenBytes(id), { stream: true });
      const found = stops.map((stop) => text.indexOf(stop, Math.max(0, sent - stop.length))).filter((at) => at >= 0);
      if (found.length) { text = text.slice(0, Math.min(...found)); result.reason = "stop"; break; }
      let end = text.length;
      for (const stop of stops) {
        for (let n = Math.min(stop.length - 1, text.length); n > 0; n--) {
          if (text.endsWith(stop.slice(0, n))) { end = Math.min(end, text.length - n); break; }
        }
      }
      show(end);
      if (await pause()) { result.reason = "stopped"; break; }
      this.decode([id]);
      read.push(id);
    }
    if (result.reason !== "stop") text += decoder.decode();
    show(text.length);
    this.keep(read);
    result.seconds = (performance.now() - start) / 1000;
    return result;
  }
}

if (typeof importScripts === "function") {
  let runtime = null, stopped = false, last = 0;
  const channel = new MessageChannel();
  /* Lets a message "stop" come in, fifty times a second. */
  const pause = async () => {
    if (performance.now() - last > 20) {
      await new Promise((resolve) => { channel.port1.onmessage = resolve; channel.port2.postMessage(0); });
      last = performance.now();
    }
    return stopped;
  };
  const open = async (file) => {
    const at = runtime.reserve(file.size);
    for (let from = 0; from < file.size; from += 1 << 24) {
      const part = new Uint8Array(await file.slice(from, from + (1 << 24)).arrayBuffer());
      runtime.view(at + from, part.length).set(part);
    }
    return runtime.open();
  };
  onmessage = async ({ data }) => {
    const { id, kind } = data;
    try {
      let result = null;
      if (kind === "stop") { stopped = true; return; }
      stopped = false;
      if (kind === "start") {
        const bytes = Uint8Array.from(atob(data.modules[chooseKind()]), (letter) => letter.charCodeAt(0));
        runtime = new Runtime(await WebAssembly.compile(bytes));
      }
      if (kind === "open") result = await open(data.file);
      if (kind === "generate") result = await runtime.generate(data.messages, data.settings, (piece) => postMessage({ id, piece }), pause);
      if (kind === "complete") result = await runtime.complete(data.text, data.settings, (piece) => postMessage({ id, piece }), pause);
      postMessage({ id, result });
    } catch (error) {
      postMessage({ id, error: error.message });
    }
  };
} else if (typeof module !== "undefined") {
  module.exports = { Runtime, chooseKind };
}
