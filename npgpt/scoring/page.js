// The panel of a page of scored texts: the figures of the chosen token, or of all tokens of a character.
const panel = document.querySelector(".panel");

function element(parent, name, ...content) {
  const made = document.createElement(name);
  made.append(...content);
  parent.append(made);
  return made;
}

for (const box of document.querySelectorAll(".text")) {
  const data = JSON.parse(box.nextElementSibling.textContent), items = [...box.children];
  const starts = [0];  // the first token of each part of the text
  for (const length of data.lengths) starts.push(starts.at(-1) + length);

  function name(parent, id) {
    if (data.pieces[id] === "") return parent.append(`id ${id}`);
    parent.append("“");
    element(parent, "bdi", data.pieces[id]);
    parent.append("”");
  }

  const percent = (logProb) => {
    const value = 100 * Math.exp(logProb);
    return (value >= 0.01 || value === 0 ? value.toFixed(2) : value.toPrecision(2)) + "\u00a0%";
  };

  function figures(list, token) {
    const term = element(list, "dt"), id = data.ids[token], logProb = data.log_probs[token];
    name(term, id);
    const place = `id ${id}, byte ${data.bytes[token].toLocaleString("en")}`;
    if (!data.ranks[token]) return element(list, "dd", `${place}: not scored`);
    const bits = (-logProb / Math.LN2 + 0).toFixed(2);
    element(list, "dd", `${bits} bits, rank ${data.ranks[token]}, probability ${percent(logProb)}, ` +
      `log-probability ${logProb.toFixed(4)}; ${place}`);
    if (!data.top_ids[token].length) return;
    element(list, "dt", "most likely");
    const likely = element(list, "dd");
    data.top_ids[token].forEach((other, place) => {
      likely.append(place ? ", " : "");
      name(likely, other);
      likely.append(` ${percent(data.top_log_probs[token][place])}`);
    });
  }

  if (items.length) choices(box, items, (part) => {
    panel.replaceChildren();
    const list = element(panel, "dl");
    for (let token = starts[part]; token < starts[part + 1]; token++) figures(list, token);
  });
}
