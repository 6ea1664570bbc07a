// Cards with pictures and a question; a click chooses one. Questions are put in as text.
export default function ({ data, parentElement, setTriggerValue }) {
  const place = parentElement.querySelector(".gallery");
  place.replaceChildren();
  data.cards.forEach((card, index) => {
    const button = document.createElement("button");
    button.type = "button";
    const pictures = document.createElement("div");
    pictures.className = "pictures";
    for (const source of card.pictures) {
      const image = document.createElement("img");
      image.src = source;
      image.alt = "";
      pictures.append(image);
    }
    const question = document.createElement("div");
    question.textContent = card.question;
    button.append(pictures, question);
    button.onclick = () => setTriggerValue("chosen", index);
    place.append(button);
  });
}
