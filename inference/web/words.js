// An answer whose words can be clicked. It is put in as text, never as HTML.
export default function ({ data, parentElement, setTriggerValue }) {
  const place = parentElement.querySelector(".answer");
  place.replaceChildren();
  const segmenter = new Intl.Segmenter(data.language, { granularity: "word" });
  // places are counted in characters, as Python does, not in UTF-16 units
  let start = 0;
  for (const { segment, isWordLike } of segmenter.segment(data.text)) {
    const here = start;
    start += Array.from(segment).length;
    if (!isWordLike) {
      place.append(document.createTextNode(segment));
      continue;
    }
    const word = document.createElement("span");
    word.textContent = segment;
    word.setAttribute("role", "button");
    word.tabIndex = 0;
    const isChosen = here < data.end && start > data.start;
    word.setAttribute("aria-pressed", isChosen);
    const choose = () => setTriggerValue("word", here);
    word.onclick = choose;
    word.onkeydown = (event) => {
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        choose();
      }
    };
    place.append(word);
  }
}
