// From a picture's file to the numbers that the vision encoder takes. Pillow's bicubic resizing is
// done here to the last bit (browsers have others), so the page answers like eval_vlm.py.

// The limits of model/image.py.
const MAX_BYTES = 64 * 2 ** 20;
const MAX_PIXELS = 89e6;
const MAX_ASPECT = 50;
// Of larger pictures the browser makes smaller ones first: they would fill its memory.
const LARGE = 25e6;
const LARGE_SIDE = 1024;
// Pillow's weights are whole numbers: shares of this one.
const ONE = 2 ** 22;

/**
 * Float32Array[3 * side * side], channel by channel, of a picture's file.
 * `facts` are those of the image processor, "picture" of model.json. An error's
 * message is for the owner of the picture.
 */
export async function readPicture(file, facts) {
  const { width, height, data } = await decode(file);

  // its new size: CLIP's processor says how long the shorter side is, others know one size only
  const short = Math.min(width, height);
  const scaled = facts.shortestEdge
    ? [width, height].map((length) => Math.trunc((facts.shortestEdge * length) / short))
    : [facts.width, facts.height];

  // a square out of the middle
  const [columns, rows] = [width, height].map((length, axis) => {
    const first = Math.floor((scaled[axis] - facts.side) / 2);
    return makeFilter(length, scaled[axis], first, facts.side);
  });

  // columns become rows in either pass, so after both the picture is upright again
  const turned = filterRows(data, width, height, columns);
  const pixels = filterRows(turned, height, facts.side, rows);

  // bytes to floats
  const area = facts.side ** 2;
  const floats = new Float32Array(3 * area);
  for (let channel = 0; channel < 3; channel++) {
    for (let i = 0; i < area; i++) {
      const share = pixels[4 * i + channel] / 255;
      floats[channel * area + i] = (share - facts.mean[channel]) / facts.std[channel];
    }
  }
  return floats;
}

/** {width, height, data} of a file: 4 bytes a pixel, upright, on white where it is transparent. */
async function decode(file) {
  if (file.size > MAX_BYTES) throw new Error("it has over 64 MB");
  let bitmap;
  try {
    // Like Pillow: the colors that are in the file. It is turned as the camera noted it.
    bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" });
  } catch {
    throw new Error("this browser cannot open it as a picture; take a JPEG, PNG or WebP");
  }

  // limits
  let { width, height } = bitmap;
  if (width * height > MAX_PIXELS) throw new Error("it has over 89 million pixels");
  if (Math.max(width, height) > MAX_ASPECT * Math.min(width, height)) {
    throw new Error(`${width} x ${height} pixels are too narrow`);
  }
  if (width * height > LARGE) {
    const factor = Math.max(1, Math.floor(Math.min(width, height) / LARGE_SIDE));
    [width, height] = [Math.ceil(width / factor), Math.ceil(height / factor)];
  }

  // pixels
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { alpha: false, willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0, width, height);
  bitmap.close();
  return { width, height, data: context.getImageData(0, 0, width, height).data };
}

/**
 * For `count` pixels of a line that is scaled from `length` to `scaled` pixels, beginning with the
 * pixel `first`: the pixels of the old line that each is made of, as {start, weights}.
 */
function makeFilter(length, scaled, first, count) {
  const scale = length / scaled;
  // A pixel that stands for several looks at all of them.
  const stretch = Math.max(scale, 1);
  return Array.from({ length: count }, (_, i) => {
    const center = (first + i + 0.5) * scale;
    const start = Math.max(0, Math.trunc(center - 2 * stretch + 0.5));
    const end = Math.min(length, Math.trunc(center + 2 * stretch + 0.5));
    const shares = Array.from({ length: end - start }, (_, j) =>
      bicubic((start + j - center + 0.5) * (1 / stretch)),
    );
    const total = shares.reduce((sum, share) => sum + share, 0);
    const weights = shares.map((share) => {
      const whole = (share / total) * ONE;
      return Math.trunc(whole + (whole < 0 ? -0.5 : 0.5));
    });
    return { start, weights };
  });
}

/** Keys' cubic with a = -1/2, as Pillow has it. */
function bicubic(x) {
  x = Math.abs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
}

/** Scale each row of a picture; what was column x comes back as row x. Clamps to 0 to 255. */
function filterRows(pixels, width, height, filter) {
  const turned = new Uint8ClampedArray(4 * filter.length * height);
  filter.forEach(({ start, weights }, x) => {
    for (let y = 0; y < height; y++) {
      for (let channel = 0; channel < 3; channel++) {
        let sum = 0;
        let place = 4 * (y * width + start) + channel;
        for (let j = 0; j < weights.length; j++, place += 4) sum += weights[j] * pixels[place];
        turned[4 * (x * height + y) + channel] = Math.floor(sum / ONE + 0.5);
      }
    }
  });
  return turned;
}
