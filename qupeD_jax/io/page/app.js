// A personal model in the browser: strokes or an image become the pixels it was trained on, and
// onnxruntime-web, which lies beside this file, says what it makes of them.

import * as ort from "./ort.js";

const FINE = 4; // strokes are drawn this much finer than pixels, and averaged
const DIGITS = 64; // of the checksum at the end of the model's file
const $ = (id) => document.getElementById(id);

const fetched = async (name) => {
  const answer = await fetch(name);
  if (!answer.ok) throw new Error(`${name}: ${answer.status} ${answer.statusText}`);
  return answer;
};

// --- the model

async function open() {
  const about = await (await fetched("model.json")).json();
  const bytes = new Uint8Array(await (await fetched("model.onnx")).arrayBuffer());
  const checksum = await verified(bytes);
  ort.env.wasm.numThreads = 1; // more need headers that a static server does not send
  ort.env.wasm.wasmBinary = await (await fetched("ort.wasm")).arrayBuffer();
  const session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
  return { about, session, checksum };
}

// The runtime does not look at the checksum: a damaged weight would pass for a sound one.
async function verified(bytes) {
  const digest = new TextDecoder().decode(bytes.slice(-DIGITS));
  if (!globalThis.crypto?.subtle) return "not verified: that takes https or localhost";
  const found = await crypto.subtle.digest("SHA-256", bytes.slice(0, -DIGITS));
  const hex = [...new Uint8Array(found)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  if (hex !== digest) throw new Error("model.onnx is damaged: its checksum does not match");
  return `sha256 ${digest}, verified`;
}

async function probabilities({ session, about }, pixels) {
  const images = new ort.Tensor("uint8", pixels, [1, ...about.shape]);
  const { logits } = await session.run({ images });
  const highest = Math.max(...logits.data);
  const odds = [...logits.data].map((logit) => Math.exp(logit - highest));
  const total = odds.reduce((sum, one) => sum + one, 0);
  return odds.map((one) => one / total);
}

// --- from strokes and files to pixels

// Puts strokes into the frame that the data set's images have, and averages over fine pixels.
function fromStrokes(strokes, { shape, white, drawing }) {
  const [height, width] = shape;
  const canvas = new OffscreenCanvas(width * FINE, height * FINE);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const pen = Math.max(1.1, 0.09 * height) * FINE;
  const room = (1 - 2 * drawing.margin) * canvas.height - pen;
  const points = strokes.flat();
  const [xs, ys] = [points.map((point) => point[0]), points.map((point) => point[1])];
  const [left, right] = [Math.min(...xs), Math.max(...xs)];
  const [top, bottom] = [Math.min(...ys), Math.max(...ys)];
  const scale = room / Math.max(right - left, bottom - top, 1);
  const place = ([x, y]) => [
    canvas.width / 2 + scale * (x - (left + right) / 2),
    canvas.height / 2 + scale * (y - (top + bottom) / 2),
  ];
  draw(context, strokes.map((stroke) => stroke.map(place)), pen);
  const fine = context.getImageData(0, 0, canvas.width, canvas.height).data;
  const pixels = new Uint8Array(height * width);
  for (let row = 0; row < height; row++) {
    for (let column = 0; column < width; column++) {
      let ink = 0;
      for (let i = 0; i < FINE; i++) {
        for (let j = 0; j < FINE; j++) {
          ink += fine[4 * ((row * FINE + i) * canvas.width + column * FINE + j)];
        }
      }
      const value = Math.round((ink / (255 * FINE * FINE)) * white);
      const at = drawing.turned ? column * width + row : row * width + column;
      pixels[at] = drawing.inverted ? white - value : value;
    }
  }
  return pixels;
}

function draw(context, strokes, pen) {
  context.fillStyle = "#000";
  context.fillRect(0, 0, context.canvas.width, context.canvas.height);
  Object.assign(context, { strokeStyle: "#fff", lineWidth: pen, lineCap: "round", lineJoin: "round" });
  for (const stroke of strokes) {
    context.beginPath();
    context.moveTo(...stroke[0]);
    for (const point of stroke.length > 1 ? stroke.slice(1) : stroke) context.lineTo(...point);
    context.stroke();
  }
}

// Fills the model's image with the middle of a picture. One of the model's size is taken as it is.
function fromPicture(picture, { shape, white }, invert) {
  const [height, width, channels] = shape;
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  const scale = Math.max(width / picture.width, height / picture.height);
  const [w, h] = [picture.width * scale, picture.height * scale];
  context.drawImage(picture, (width - w) / 2, (height - h) / 2, w, h);
  const data = context.getImageData(0, 0, width, height).data;
  const pixels = new Uint8Array(height * width * channels);
  for (let i = 0; i < height * width; i++) {
    const [red, green, blue] = data.slice(4 * i, 4 * i + 3);
    // Grey as ITU-R 601 has it: what `quped predict` makes of a grey image is the same.
    const values = channels === 1 ? [(299 * red + 587 * green + 114 * blue) / 1000] : [red, green, blue];
    values.forEach((value, c) => {
      const scaled = Math.round((value * white) / 255);
      pixels[i * channels + c] = invert ? white - scaled : scaled;
    });
  }
  return pixels;
}

// --- the page

const bytes = (count) =>
  count < 1e6 ? `${(count / 1e3).toFixed(1)} kB` : `${(count / 1e6).toFixed(1)} MB`;

function introduce({ about, checksum }) {
  const [height, width] = about.shape;
  const whose = about.client === null ? "" : `, client ${about.client}`;
  $("title").textContent = `A personal model${whose}`;
  const precision = about.bits === 32 ? "full precision" : about.bits && `${about.bits} bits a weight`;
  const facts = [about.model, precision, about.dataset && `trained on ${about.dataset}`];
  $("subtitle").textContent = facts.filter(Boolean).join(" · ");
  $("pixels").textContent = `${height} × ${width} pixels, 0 to ${about.white}`;
  $("invitation").textContent = about.drawing ? "Draw, or drop an image" : "Drop an image";
  const times = (about.bytes_in_float32 / about.bytes).toFixed(1);
  const rows = [
    ["the model, as ONNX", bytes(about.bytes)],
    ["its tensors in float32", bytes(about.bytes_in_float32)],
    [`${about.runtime}, gzipped`, bytes(about.runtime_bytes_gzipped)],
  ];
  for (const cells of rows) {
    const row = $("sizes").insertRow();
    cells.forEach((text) => (row.insertCell().textContent = text));
  }
  const outweighs = about.runtime_bytes_gzipped / about.bytes;
  $("honest").textContent =
    `Codes and codebooks make the model ${times} times smaller. The runtime outweighs it ` +
    `${outweighs < 10 ? outweighs.toFixed(1) : Math.round(outweighs)} times; any number of models ` +
    "share it. Nothing that you draw or drop leaves this page.";
  for (const name of about.classes) {
    const item = document.createElement("li");
    item.innerHTML = '<span class="name"></span><div class="track"><div class="fill"></div></div><span class="percent"></span>';
    item.querySelector(".name").textContent = name;
    $("bars").append(item);
  }
  $("status").textContent = checksum;
}

function show(about, pixels, odds, milliseconds) {
  const [height, width, channels] = about.shape;
  Object.assign($("seen"), { width, height });
  const image = new ImageData(width, height);
  for (let i = 0; i < height * width; i++) {
    for (let c = 0; c < 3; c++) {
      image.data[4 * i + c] = (pixels[i * channels + Math.min(c, channels - 1)] * 255) / about.white;
    }
    image.data[4 * i + 3] = 255;
  }
  $("seen").getContext("2d").putImageData(image, 0, 0);
  const best = odds.indexOf(Math.max(...odds));
  [...$("bars").children].forEach((item, i) => {
    item.classList.toggle("best", i === best);
    item.querySelector(".fill").style.width = `${100 * odds[i]}%`;
    item.querySelector(".percent").textContent = `${(100 * odds[i]).toFixed(1)} %`;
    item.dataset.probability = odds[i];
  });
  $("time").textContent = `${milliseconds.toFixed(1)} ms, on this device`;
}

function fail(error) {
  $("status").textContent = error.message;
  $("status").classList.add("bad");
}

async function main() {
  const model = await open();
  const { about } = model;
  introduce(model);
  const pad = $("pad");
  const context = pad.getContext("2d");
  let strokes = [];
  let picture = null;
  let latest = 0;

  // One after the other, since a session runs once at a time; what has been overtaken is left out.
  let queue = Promise.resolve();
  const predict = (pixels) => {
    const mine = ++latest;
    queue = queue.catch(() => {}).then(async () => {
      if (mine !== latest) return;
      const start = performance.now();
      const odds = await probabilities(model, pixels);
      if (mine === latest) show(about, pixels, odds, performance.now() - start);
    });
    return queue;
  };
  const clear = () => {
    strokes = [];
    picture = null;
    latest++;
    draw(context, [], 1);
    $("seen").getContext("2d").clearRect(0, 0, $("seen").width, $("seen").height);
    for (const item of $("bars").children) {
      item.classList.remove("best");
      item.querySelector(".fill").style.width = "0";
      item.querySelector(".percent").textContent = "";
    }
    $("time").textContent = "";
  };
  const load = async (file) => {
    clear();
    picture = await createImageBitmap(file, { colorSpaceConversion: "none" });
    const scale = Math.max(pad.width / picture.width, pad.height / picture.height);
    const [w, h] = [picture.width * scale, picture.height * scale];
    context.imageSmoothingEnabled = scale < 1;
    context.drawImage(picture, (pad.width - w) / 2, (pad.height - h) / 2, w, h);
    await predict(fromPicture(picture, about, $("invert").checked));
  };
  const guarded = (act) => (event) => Promise.resolve(act(event)).catch(fail);
  const at = (event) => [event.offsetX, event.offsetY];

  if (about.drawing) {
    let drawing = false;
    pad.addEventListener("pointerdown", (event) => {
      if (picture) clear();
      drawing = true;
      pad.setPointerCapture(event.pointerId);
      strokes.push([at(event)]);
    });
    pad.addEventListener("pointermove", (event) => {
      if (!drawing) return;
      strokes.at(-1).push(at(event));
      draw(context, strokes, 0.1 * pad.width);
    });
    pad.addEventListener("pointerup", guarded(() => {
      drawing = false;
      draw(context, strokes, 0.1 * pad.width);
      return predict(fromStrokes(strokes, about));
    }));
  }
  $("clear").addEventListener("click", clear);
  $("file").addEventListener("change", guarded((event) => event.target.files[0] && load(event.target.files[0])));
  $("invert").addEventListener("change", guarded(() => picture && predict(fromPicture(picture, about, $("invert").checked))));
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    pad.classList.add("dropping");
  });
  document.addEventListener("dragleave", () => pad.classList.remove("dropping"));
  document.addEventListener("drop", guarded((event) => {
    event.preventDefault();
    pad.classList.remove("dropping");
    return event.dataTransfer.files[0] && load(event.dataTransfer.files[0]);
  }));
  clear();
  document.body.dataset.ready = "yes";
}

main().catch(fail);
