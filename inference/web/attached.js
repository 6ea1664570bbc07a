// Tells the page the names of the files beside the question, so that it can say which of them did
// not arrive: too large, or still on their way when the question was sent.
const SENT = 2000; // ms in which a question that was sent reaches the page
let told = "[]";
let batch = 0; // of files, counted up whenever there were none before
let later;

export default function ({ setStateValue }) {
  const tell = () => {
    const chips = document.querySelectorAll('[data-testid="stFileChipName"]');
    const names = [...chips].map((chip) => chip.title);
    if (JSON.stringify(names) === told) return;
    if (told === "[]") batch += 1;
    told = JSON.stringify(names);
    // They vanish when the question is sent, and the page has to know them still.
    clearTimeout(later);
    if (names.length) setStateValue("files", { batch, names });
    else later = setTimeout(() => setStateValue("files", { batch, names }), SENT);
  };
  const observer = new MutationObserver(tell);
  observer.observe(document.body, { childList: true, subtree: true });
  tell(); // what happened while nobody observed
  return () => observer.disconnect();
}
