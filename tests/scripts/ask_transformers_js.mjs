// Ask an exported model with transformers.js as it is published, in Node.
// node ask.mjs FOLDER QUESTION PICTURE ... prints the ids of the prompt, and those of the answer.

import { AutoProcessor, LlavaForConditionalGeneration, env, load_image } from "@huggingface/transformers";

const [folder, question, ...paths] = process.argv.slice(2);
env.allowRemoteModels = false;
const options = { dtype: "fp32", local_files_only: true };
const processor = await AutoProcessor.from_pretrained(folder, options);
const model = await LlavaForConditionalGeneration.from_pretrained(folder, options);

// Its own LlavaProcessor makes room for the first picture only.
const pictures = await Promise.all(paths.map((path) => load_image(path)));
const content = [...pictures.map(() => ({ type: "image" })), { type: "text", text: question }];
const text = processor
  .apply_chat_template([{ role: "user", content }], { add_generation_prompt: true })
  .replaceAll("<image>", "<image>".repeat(196));
const inputs = {
  ...processor.tokenizer(text, { add_special_tokens: false }),
  ...(pictures.length ? await processor.image_processor(pictures) : {}),
};
const output = await model.generate({ ...inputs, do_sample: false, max_new_tokens: 32 });
const ids = output.tolist()[0].map(Number);
const nPrompt = inputs.input_ids.dims[1];
console.log(JSON.stringify({ prompt: ids.slice(0, nPrompt), answer: ids.slice(nPrompt) }));
