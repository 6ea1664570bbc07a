// The page: pictures and a question go in, an answer comes out word by word. The model is in
// worker.js; what anybody wrote is put on the page as text, never as HTML.

const $ = (id) => document.getElementById(id);
const pictures = new Map(); // number -> {item: its place on the page, looked: a promise}
let facts; // of model.json; undefined until the model is loaded
let isAnswering = false;
let isStopped = false;
let nPictures = 0; // that were ever added

// ---- the model ----------------------------------------------------------------------------------

const worker = new Worker("worker.js", { type: "module" });
const requests = new Map(); // number -> {resolve, reject, tell}
let nRequests = 0;

/** Ask the worker to do something; resolves to what it returns. */
function request(action, args = [], tell = () => {}) {
  return new Promise((resolve, reject) => {
    requests.set(++nRequests, { resolve, reject, tell });
    worker.postMessage({ id: nRequests, action, args });
  });
}

worker.onmessage = ({ data: { id, progress, result, error } }) => {
  const { resolve, reject, tell } = requests.get(id);
  if (progress) return tell(progress);
  requests.delete(id);
  return error ? reject(new Error(error)) : resolve(result);
};

// The script itself, or the library that it imports, is missing or too new for this browser.
worker.onerror = () => {
  for (const { reject } of requests.values()) reject(new Error("worker.js does not start"));
};

async function load() {
  const megabytes = (bytes) => (bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0);
  $("status").textContent = "Loading the model …";
  $("progress").hidden = false;
  try {
    facts = await request("load", [], ({ loaded, total }) => {
      $("progress").max = total;
      $("progress").value = loaded;
      $("status").textContent =
        `Loading the model: ${megabytes(loaded)} of ${megabytes(total)} MB`;
    });
  } catch (error) {
    showProblem(`The model cannot be loaded: ${error.message}. Reload the page to try again.`);
    return;
  } finally {
    $("status").textContent = "";
    $("progress").hidden = true;
  }

  // what it is
  const size = Object.values(facts.files).reduce((sum, bytes) => sum + bytes, 0);
  $("model").textContent =
    `${facts.name}, ${(facts.nParameters / 1e6).toFixed(1)} M parameters, ${megabytes(size)} MB`;
  $("knows").textContent = facts.knows;
  $("knows").hidden = !facts.knows;
  if (!$("question").value) suggestQuestion();
  $("ask").disabled = false;
}

// ---- pictures -----------------------------------------------------------------------------------

/** Show pictures, and let the model look at them while the question is typed. */
function addPictures(files) {
  if (!files.length) return;
  hideProblem();
  for (const file of files) {
    const key = ++nPictures;
    const item = document.createElement("li");
    const image = document.createElement("img");
    image.src = URL.createObjectURL(file);
    image.alt = file.name;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "×";
    button.title = "Remove this picture";
    button.addEventListener("click", () => removePicture(key));
    item.append(image, button);
    item.classList.add("waiting");
    $("gallery").append(item);
    const looked = request("look", [key, file])
      .then(() => item.classList.remove("waiting"))
      .catch((error) => {
        removePicture(key);
        showProblem(`${file.name}: ${error.message}.`);
      });
    pictures.set(key, { item, looked });
  }
  suggestQuestion();
}

function removePicture(key) {
  const { item } = pictures.get(key) ?? {};
  if (!item) return;
  URL.revokeObjectURL(item.querySelector("img").src);
  item.remove();
  pictures.delete(key);
  request("forget", [key]);
  suggestQuestion();
}

async function loadExamples() {
  const response = await fetch("examples/list.json");
  if (!response.ok) return;
  for (const name of await response.json()) {
    const button = document.createElement("button");
    const image = document.createElement("img");
    image.src = `examples/${encodeURIComponent(name)}`;
    image.alt = `Example ${name}`;
    button.append(image);
    button.addEventListener("click", async () => {
      const blob = await (await fetch(image.src)).blob();
      // another example comes in place of the last one
      [...pictures.keys()].forEach(removePicture);
      addPictures([new File([blob], name, { type: blob.type })]);
    });
    $("examples").append(button);
    $("examples").hidden = false;
  }
}

// ---- question and answer ------------------------------------------------------------------------

/** The question that the model was trained with, until somebody types another one. */
function suggestQuestion() {
  const field = $("question");
  if (!facts || (field.value && field.value !== field.dataset.suggested)) return;
  field.value = pictures.size > 1 ? facts.questionForSeveral : facts.question;
  field.dataset.suggested = field.value;
}

async function answer() {
  // begin
  hideProblem();
  if (!pictures.size) showProblem("Without a picture the model can only guess: add one.");
  isAnswering = true;
  isStopped = false;
  $("ask").textContent = "Stop";
  $("answer").textContent = "";
  $("answer").dataset.ids = "";
  $("answer").className = "writing";
  $("answer").ariaBusy = true;
  $("speed").textContent = "";
  const began = performance.now();

  // a token at a time
  try {
    await Promise.all([...pictures.values()].map(({ looked }) => looked));
    let step = await request("begin", [$("question").value, [...pictures.keys()]]);
    const firstCame = performance.now();
    const show = () => {
      $("answer").textContent = step.text;
      $("answer").dataset.ids = step.ids.join(" ");
      $("speed").textContent = describeSpeed(step.ids.length, began, firstCame);
    };
    show();
    // on a phone it may be below the screen
    $("speed").scrollIntoView({ block: "nearest", behavior: "smooth" });
    while (!step.isOver && !isStopped && step.ids.length < facts.maxNewTokens) {
      step = await request("next");
      show();
    }
  } catch (error) {
    showProblem(error.message);
  }

  // end
  isAnswering = false;
  $("ask").textContent = "Ask";
  $("answer").className = "complete";
  $("answer").ariaBusy = false;
}

/** "12 tokens, the first after 0.4 s, then 90 a second". */
function describeSpeed(n, began, firstCame) {
  const first = ((firstCame - began) / 1000).toFixed(1);
  const line = `${n} ${n === 1 ? "token" : "tokens"}, the first after ${first} s`;
  const rate = ((n - 1) / (performance.now() - firstCame)) * 1000;
  return n === 1 ? line : `${line}, then ${rate.toFixed(0)} a second`;
}

function showProblem(text) {
  $("problem").textContent = text;
  $("problem").hidden = false;
}

function hideProblem() {
  $("problem").hidden = true;
}

// ---- what people do -----------------------------------------------------------------------------

$("file").addEventListener("change", () => {
  addPictures([...$("file").files]);
  $("file").value = "";
});

document.addEventListener("paste", ({ clipboardData }) => addPictures([...clipboardData.files]));

document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
document.addEventListener("dragleave", ({ relatedTarget }) => {
  if (!relatedTarget) document.body.classList.remove("dropping");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  addPictures([...event.dataTransfer.files]);
});

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (isAnswering) isStopped = true;
  else answer();
});
$("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!$("ask").disabled && !isAnswering) answer();
});

load();
loadExamples();
