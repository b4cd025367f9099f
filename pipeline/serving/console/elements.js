// Elements of the page. Whatever a model or a person wrote becomes a text node, never markup.

const $ = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}

// For those who do not see the page; said once, politely.
function announce(text) {
  $("live").textContent = text;
}

// A live region is not told again what it says already.
function say(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text;
}

function number(value) {
  return value.toFixed(2).replace("-", "−");
}

const ago = new Intl.RelativeTimeFormat("en", { numeric: "auto" });
const UNITS = [["day", 86400], ["hour", 3600], ["minute", 60], ["second", 1]];

function since(moment) {
  const seconds = Math.min(0, (Date.parse(moment) - Date.now()) / 1000);
  const [unit, size] = UNITS.find(([, size]) => -seconds >= size) ?? ["second", 1];
  return ago.format(Math.round(seconds / size), unit);
}

function time(moment) {
  const exactly = new Date(moment).toLocaleString();
  return make("time", { datetime: moment, title: exactly }, since(moment));
}

// Show `items` in `list`, keeping the elements of those that were there: focus and selection survive a refresh.
function show(list, items, { id, draw, update }) {
  const names = items.map((item) => String(id(item)));
  for (const element of [...list.children]) if (!names.includes(element.dataset.id)) element.remove();
  const there = new Map([...list.children].map((element) => [element.dataset.id, element]));
  items.forEach((item, place) => {
    const name = names[place];
    let element = there.get(name);
    if (!element) {
      element = draw(item);
      element.dataset.id = name;
    }
    update?.(element, item);
    if (list.children[place] !== element) list.insertBefore(element, list.children[place] ?? null);
  });
}

// Ask before `act`; the dialog stays open, with the reason in it, where that fails. Resolves to what `act` returned.
function confirmed({ title, text, yes, act }) {
  const dialog = $("confirm"), button = $("confirm-yes");
  $("confirm-title").textContent = title;
  $("confirm-text").textContent = text;
  $("confirm-wrong").textContent = "";
  button.textContent = yes;
  return new Promise((resolve) => {
    let done;
    button.disabled = false;
    button.onclick = async () => {
      button.disabled = true;
      try {
        done = await act();
        dialog.close();
      } catch (error) {
        $("confirm-wrong").textContent = error.message;
        button.disabled = false;
        button.focus();
      }
    };
    $("confirm-no").onclick = () => dialog.close();
    dialog.onclose = () => resolve(done);
    dialog.showModal();
    $("confirm-no").focus();
  });
}
