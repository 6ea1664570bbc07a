// The model, in a thread of its own so that the page never stands still. It runs three ONNX graphs
// with onnxruntime-web: the vision encoder once for each picture, the decoder once for each token.

import * as ort from "./lib/ort.wasm.min.mjs";
import { Tokenizer } from "./lib/tokenizers.min.mjs";
import { readPicture } from "./picture.js";
import { encodePrompt } from "./prompt.js";

ort.env.wasm.wasmPaths = new URL("lib/", import.meta.url).href;

let facts; // of model.json
let tokenizer;
const graphs = {}; // vision_encoder, embed_tokens, decoder_model_merged
const features = new Map(); // of each picture: Float32Array[patches * dim]
let state; // of the answer that is being written

// What the page can ask for.
const actions = {
  /** Fetch and build everything; `tell` hears how much has come. Returns what model.json says. */
  async load(tell) {
    facts = await (await fetchFile("model.json")).json();
    const total = Object.values(facts.files).reduce((sum, size) => sum + size, 0);
    let loaded = 0;
    const count = (n) => tell({ loaded: (loaded += n), total });
    for (const [name, size] of Object.entries(facts.files)) {
      const bytes = await download(name, size, count);
      if (name === "tokenizer.json") {
        tokenizer = new Tokenizer(JSON.parse(new TextDecoder().decode(bytes)), {});
      } else {
        graphs[name.split(".")[0]] = await ort.InferenceSession.create(bytes);
      }
    }
    return facts;
  },

  /** Look at a picture, and remember it as number `key`. */
  async look(key, file) {
    if (!graphs.vision_encoder) throw new Error("the model is not loaded");
    const pixels = await readPicture(file, facts.picture);
    const { side } = facts.picture;
    const pixel_values = new ort.Tensor("float32", pixels, [1, 3, side, side]);
    const { image_features } = await graphs.vision_encoder.run({ pixel_values });
    features.set(key, image_features.data);
  },

  forget(key) {
    features.delete(key);
  },

  /** Read a question about some pictures, and write the first token of the answer. */
  async begin(question, keys) {
    const encode = (text) => tokenizer.encode(text, { add_special_tokens: false }).ids;
    const { ids, places } = encodePrompt(question, keys.length, facts.prompt, encode);
    const embeddings = await embed(ids);
    const { data, dims } = embeddings;
    keys.forEach((key, i) => data.set(features.get(key), places[i] * dims[2]));
    state = { cache: emptyCache(), length: 0, answer: [] };
    return addToken(embeddings);
  },

  /** Write the next token. */
  async next() {
    return addToken(await embed(state.answer.slice(-1)));
  },
};

/** int64[1, n] of n numbers. */
function whole(numbers) {
  return new ort.Tensor("int64", BigInt64Array.from(numbers, BigInt), [1, numbers.length]);
}

/** float32[1, n, dim] of n token ids. */
async function embed(ids) {
  return (await graphs.embed_tokens.run({ input_ids: whole(ids) })).inputs_embeds;
}

/** Run the decoder over embeddings, take the likeliest token, and say how far the answer is. */
async function addToken(inputs_embeds) {
  // one step; positions count on, and nothing is padding
  const n = inputs_embeds.dims[1];
  const positions = Array.from({ length: n }, (_, i) => state.length + i);
  state.length += n;
  const outputs = await graphs.decoder_model_merged.run({
    inputs_embeds,
    attention_mask: whole(Array(state.length).fill(1)),
    position_ids: whole(positions),
    ...state.cache,
  });
  for (const name of Object.keys(state.cache)) {
    state.cache[name] = outputs[name.replace("past_key_values", "present")];
  }

  // the likeliest token, by the logits of the last place
  const { data, dims } = outputs.logits;
  const logits = data.subarray(-dims[2]);
  let token = 0;
  for (let id = 1; id < logits.length; id++) if (logits[id] > logits[token]) token = id;
  state.answer.push(token);

  // text
  const words = state.answer.filter((id) => !facts.prompt.specialIds.includes(id));
  return {
    ids: state.answer,
    // This sign means that the last character's other bytes are still to come.
    text: tokenizer.decode(words).replace(/\ufffd$/, ""),
    isOver: token === facts.prompt.endId || state.length + 1 >= facts.prompt.maxTokens,
  };
}

/** Keys and values of no token yet: float32[1, nKvHeads, 0, headDim] each. */
function emptyCache() {
  const { nKvHeads, headDim } = facts.decoder;
  const names = graphs.decoder_model_merged.inputNames.filter((name) => name.startsWith("past"));
  const empty = () => new ort.Tensor("float32", new Float32Array(0), [1, nKvHeads, 0, headDim]);
  return Object.fromEntries(names.map((name) => [name, empty()]));
}

async function fetchFile(name) {
  const response = await fetch(new URL(`model/${name}`, import.meta.url));
  if (!response.ok) throw new Error(`the server has no model/${name} (${response.status})`);
  return response;
}

/** The `size` bytes of a file; `count` hears how many more have come. */
async function download(name, size, count) {
  const reader = (await fetchFile(name)).body.getReader();
  const bytes = new Uint8Array(size);
  let place = 0;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    if (place + value.length > size) throw new Error(`model/${name} has over ${size} bytes`);
    bytes.set(value, place);
    place += value.length;
    count(value.length);
  }
  if (place < size) throw new Error(`model/${name} has ${place} bytes instead of ${size}`);
  return bytes;
}

// One request after the other: {id, action, args} is answered by {id, result} or {id, error}.
let last = Promise.resolve();
self.onmessage = ({ data: { id, action, args } }) => {
  const tell = (progress) => self.postMessage({ id, progress });
  last = last
    .then(() => actions[action](...args, tell))
    .then((result) => self.postMessage({ id, result }))
    .catch((error) => self.postMessage({ id, error: error.message ?? String(error) }));
};
