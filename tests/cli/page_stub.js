// Runs the script of a page against a stand-in for the browser, moves the pointer and zooms, and prints what it wrote as JSON.
const script = require("fs").readFileSync(process.argv[2], "utf8").split("<script>")[1].split("</script>")[0];
let written = [];
const context = new Proxy({}, {
  get: (known, name) => known[name] ?? ((...values) => {
    if (values.some(v => typeof v === "number" && !Number.isFinite(v))) throw new Error(`${String(name)}(${values})`);
    if (name === "fillText") written.push(values[0]);
  }),
  set: (known, name, value) => { known[name] = value; return true; },
});
const element = () => ({
  style: {}, clientWidth: 1000, offsetWidth: 100, offsetHeight: 20, on: {}, textContent: "", innerHTML: "",
  getContext: () => context, setPointerCapture() {}, addEventListener(name, call) { this.on[name] = call; },
});
const elements = {};
globalThis.document = {getElementById: id => elements[id] ??= element()};
globalThis.window = {devicePixelRatio: 2, innerWidth: 1200, innerHeight: 800, addEventListener() {}};
globalThis.requestAnimationFrame = call => call();
eval(script);
const first = written, {time, memory, tip} = elements, tips = new Set();
const event = (x, y, more) => ({offsetX: x, offsetY: y, clientX: x, clientY: y, preventDefault() {}, ...more});
for (let x = 0; x < 1000; x += 7) for (const y of [5, 30, 53, 77, 9999]) for (const canvas of [time, memory]) {
  canvas.on.pointermove(event(x, y)); tips.add(tip.textContent);
}
for (let i = 0; i < 60; i++) { written = []; time.on.wheel(event(500, 5, {deltaY: -200})); }
const zoomed = written;
for (let i = 0; i < 80; i++) time.on.wheel(event(300, 5, {deltaY: 300}));
time.on.pointerdown(event(300, 5)); time.on.pointermove(event(100, 5)); time.on.pointerup(event(100, 5));
time.on.pointerdown(event(300, 30)); time.on.pointerup(event(300, 30)); time.on.dblclick(event(1, 1));
const legend = elements.legend.innerHTML.replace(/<[^>]*>/g, " ");
console.log(JSON.stringify({first, zoomed, tips: [...tips], legend, picked: elements.which.textContent}));
