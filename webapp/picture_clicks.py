"""Makes `gr.Image` report all clicks: those on a picture whose successor is loading, and boxes that are dragged.

A drag becomes a click on each of two opposite corners.
"""

# Runs in the browser. While a box is drawn, its outline follows the pointer, which may leave the picture.
COMPLETE_CLICKS = """
() => {
  // While the next picture loads, Chrome shows the last one but says that it has no size, and gradio drops clicks.
  document.addEventListener("load", ({ target: image }) => {
    if (!image.closest?.("#picture img")) return;
    for (const side of ["naturalWidth", "naturalHeight"]) {
      delete image[side];  // that of the last picture
      Object.defineProperty(image, side, { value: image[side], configurable: true });
    }
  }, { capture: true });

  const isBox = () => document.querySelector("#mode input:checked")?.value === "box";

  function shownArea(image) {  // of the element, which may be wider or higher than the picture in it
    const { left, top, width, height } = image.getBoundingClientRect();
    const scale = Math.min(width / image.naturalWidth, height / image.naturalHeight, 1);
    const [shownWidth, shownHeight] = [image.naturalWidth * scale, image.naturalHeight * scale];
    return { left: left + (width - shownWidth) / 2, top: top + (height - shownHeight) / 2, shownWidth, shownHeight };
  }

  function within(event, { left, top, shownWidth, shownHeight }) {
    const clamp = (value, low, size) => Math.min(Math.max(value, low + 1), low + size - 1);
    return { clientX: clamp(event.clientX, left, shownWidth), clientY: clamp(event.clientY, top, shownHeight) };
  }

  document.addEventListener("dragstart", (event) => event.target.closest?.("#picture") && event.preventDefault());
  document.addEventListener("pointerdown", (down) => {
    const image = down.target.closest?.("#picture img");
    if (!image?.naturalWidth || down.button || !isBox()) return;
    const area = shownArea(image), start = within(down, area), end = new AbortController();
    const outline = document.body.appendChild(document.createElement("div"));
    outline.id = "drag-outline";
    const listen = (type, listener) => document.addEventListener(type, listener, { signal: end.signal });
    const stop = () => { outline.remove(); end.abort(); };
    listen("pointermove", (event) => {
      const place = within(event, area);
      outline.style.left = `${Math.min(start.clientX, place.clientX)}px`;
      outline.style.top = `${Math.min(start.clientY, place.clientY)}px`;
      outline.style.width = `${Math.abs(start.clientX - place.clientX)}px`;
      outline.style.height = `${Math.abs(start.clientY - place.clientY)}px`;
    });
    listen("pointercancel", stop);
    listen("pointerup", (event) => {
      stop();
      if (Math.hypot(event.clientX - down.clientX, event.clientY - down.clientY) < 8) return;  // a click
      for (const corner of [start, within(event, area)]) {
        image.dispatchEvent(new MouseEvent("click", { bubbles: true, ...corner }));
      }
      const last = (click) => click.stopPropagation();  // the browser's own, at the end of the drag
      window.addEventListener("click", last, { capture: true });
      setTimeout(() => window.removeEventListener("click", last, { capture: true }));
    });
  });
}
"""
