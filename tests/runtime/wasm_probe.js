"use strict";
/* node wasm_probe.js WORKER.JS WASM COUNT MODEL…: for each model, on a line of JSON, COUNT greedy ids and what they took. */
const fs = require("node:fs");
const [worker, wasm, count, ...models] = process.argv.slice(2);
const { Runtime } = require(require("node:path").resolve(worker));

(async () => {
  const runtime = new Runtime(new WebAssembly.Module(fs.readFileSync(wasm)));
  for (const path of models) {
    const file = fs.readFileSync(path), at = runtime.reserve(file.length);
    runtime.view(at, file.length).set(file);
    const info = runtime.open();
    const prompt = Array.from({ length: 37 }, (_, i) => (i * 7919) % info.vocabSize), ids = [];
    runtime.setSampling({ temperature: 0 });
    runtime.decode(prompt);
    const start = performance.now();
    for (let i = 0; i < Number(count); i++) {
      ids.push(runtime.sample());
      runtime.decode(ids.slice(-1));
    }
    const seconds = (performance.now() - start) / 1000;
    let said = "";
    const messages = [{ role: "system", content: "Be brief." }, { role: "user", content: "Hé!" }];
    const settings = { temperature: 0, topP: 1, maxTokens: 16 };
    const first = await runtime.generate(messages, settings, (piece) => { said += piece; }, async () => false);
    let again = "";
    const second = await runtime.generate(messages, settings, (piece) => { again += piece; }, async () => false);
    console.log(JSON.stringify({ ids, seconds, kernels: info.kernels, tokens: runtime.tokenize("Hé!\u0000"), same: said === again, said, first, second }));
  }
})().catch((error) => { console.error(`error: ${error.message}`); process.exit(1); });
