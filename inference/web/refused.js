// Tells the page which files the browser did not upload, so that it can say so in words.
export default function ({ parentElement, setStateValue }) {
  const chip = '[data-testid="stFileChip"][aria-invalid="true"] [data-testid="stFileChipName"]';
  const tell = () => {
    const names = [...document.querySelectorAll(chip)].map((name) => name.title);
    if (JSON.stringify(names) !== parentElement.told) {
      parentElement.told = JSON.stringify(names);
      setStateValue("names", names);
    }
  };
  parentElement.told ??= "[]";
  parentElement.observer?.disconnect();
  parentElement.observer = new MutationObserver(tell);
  const attributes = { attributes: true, attributeFilter: ["aria-invalid"] };
  parentElement.observer.observe(document.body, { childList: true, subtree: true, ...attributes });
  return () => parentElement.observer.disconnect();
}
