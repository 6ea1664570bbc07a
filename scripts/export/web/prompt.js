// From a question to token ids, piece by piece as model/processing.py does it: what somebody typed
// can pose neither as the end of a turn nor as a picture.

const TAG = "<image>";

/**
 * The question with one tag for each picture; those that are not in it come before it. A tag that
 * somebody typed beyond them is no picture: it is left out.
 */
function addImageTags(question, nPictures) {
  const nTyped = question.split(TAG).length - 1;
  question = `${TAG}\n`.repeat(Math.max(0, nPictures - nTyped)) + question;
  // Again and again: "<im<image>age>" without its tag is another one.
  for (;;) {
    const pieces = question.split(TAG);
    if (pieces.length - 1 <= nPictures) return question;
    question = pieces.slice(0, nPictures + 1).join(TAG) + pieces.slice(nPictures + 1).join("");
  }
}

/**
 * {ids, places} of a question about so many pictures: the prompt's token ids, and where in them
 * each picture begins. `facts` is "prompt" of model.json, `encode` turns plain text into ids. An
 * error's message is for whoever typed the question.
 */
export function encodePrompt(question, nPictures, facts, encode) {
  // check
  if (!question.trim()) throw new Error("Type a question first.");
  if (question.length > facts.maxCharacters) {
    throw new Error(
      `The question has ${question.length} characters but may have ${facts.maxCharacters}: ` +
        "shorten it.",
    );
  }

  // A line break keeps an '@' of the text away from a picture, which is a run of them.
  const { imageId, nImageTokens, lineBreak } = facts;
  const ids = [...facts.before];
  const places = [];
  const pieces = addImageTags(question, nPictures).split(TAG);
  pieces.forEach((piece, index) => {
    const text = breakRuns(encode(piece), facts);
    if (index > 0) {
      places.push(ids.length);
      for (let i = 0; i < nImageTokens; i++) ids.push(imageId);
      if (text[0] === imageId) ids.push(...lineBreak);
    }
    for (const id of text) ids.push(id);
    if (index < pieces.length - 1 && text.at(-1) === imageId) ids.push(...lineBreak);
  });
  ids.push(...facts.after);

  // is there room for an answer
  if (ids.length >= facts.maxTokens) {
    throw new Error(
      `The question and its pictures have ${ids.length} tokens but the model takes ` +
        `${facts.maxTokens}: shorten it, or take fewer pictures.`,
    );
  }
  return { ids, places };
}

/** The same ids, but a run of '@' as long as a picture's is broken by a line break. */
function breakRuns(ids, { imageId, nImageTokens, lineBreak }) {
  const broken = [];
  let run = 0;
  for (const id of ids) {
    run = id === imageId ? run + 1 : 0;
    if (run === nImageTokens) {
      broken.push(...lineBreak);
      run = 1;
    }
    broken.push(id);
  }
  return broken;
}
