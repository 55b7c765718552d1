"use strict";
// Lets the items in a box be chosen by mouse, touch or keyboard: show(number) is called with the place of the item that is
// pointed at, and else of the chosen one. Left and right go to the neighbours in the list; up and down go to the nearest
// item in the line above or below, whether the items are words of a text or cells of a table. One item has a tab stop.
// Returns choose(number).
function choices(box, items, show, hover = true) {
  const numbers = new Map(items.map((item, number) => [item, number]));
  let chosen = 0;

  function choose(number) {
    items[chosen].removeAttribute("tabindex");
    items[chosen].classList.remove("chosen");
    chosen = number;
    items[chosen].tabIndex = 0;
    items[chosen].classList.add("chosen");
    show(chosen);
  }

  function under(event) {
    let element = event.target;
    while (element !== box && !numbers.has(element)) element = element.parentNode;
    return numbers.get(element);
  }

  function place(number) {
    const { left, top, width, height } = items[number].getClientRects()[0] ?? items[number].getBoundingClientRect();
    return { x: left + width / 2, y: top + height / 2, height };
  }

  function nextLine(step) {
    const from = place(chosen);
    let best = chosen, line = null, distance = Infinity;
    for (let number = chosen + step; number in items; number += step) {
      const { x, y, height } = place(number);
      if (Math.abs(y - (line ?? from.y)) < from.height / 2) {
        if (line === null) continue;
      } else if (line !== null) break;
      line ??= y;
      if (Math.abs(x - from.x) < distance) [best, distance] = [number, Math.abs(x - from.x)];
    }
    return best;
  }

  const moves = {
    ArrowLeft: () => Math.max(0, chosen - 1), ArrowRight: () => Math.min(items.length - 1, chosen + 1),
    ArrowUp: () => nextLine(-1), ArrowDown: () => nextLine(1), Home: () => 0, End: () => items.length - 1,
  };
  box.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || !(event.key in moves)) return;
    event.preventDefault();
    choose(moves[event.key]());
    items[chosen].focus();
  });
  if (hover) {
    box.addEventListener("mouseover", (event) => show(under(event) ?? chosen));
    box.addEventListener("mouseleave", () => show(chosen));
  }
  box.addEventListener("focusin", () => show(chosen));
  box.addEventListener("click", (event) => {
    const number = under(event);
    if (number === undefined) return;
    choose(number);
    items[number].focus();
  });
  items[0].tabIndex = 0;
  return choose;
}
