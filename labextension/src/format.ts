/** Values as people read them; the same words as those of the Python side. */

/** `$1.25`, with more digits where cents would hide it: `$0.0042`. */
export function usd(amount: number): string {
  if (amount === 0 || amount >= 0.1) {
    return `$${amount.toFixed(2)}`;
  }
  return amount >= 0.00005 ? `$${amount.toFixed(4)}` : '<$0.0001';
}

/** `45s`, `12m05s`, `3h20m`, `2d3h`. */
export function duration(seconds: number): string {
  const whole = Math.max(Math.round(seconds), 0);
  const two = (value: number) => String(value).padStart(2, '0');
  if (whole < 60) {
    return `${whole}s`;
  }
  if (whole < 3600) {
    return `${Math.floor(whole / 60)}m${two(whole % 60)}s`;
  }
  if (whole < 86400) {
    return `${Math.floor(whole / 3600)}h${two(Math.floor(whole / 60) % 60)}m`;
  }
  return `${Math.floor(whole / 86400)}d${Math.floor(whole / 3600) % 24}h`;
}

/** `12/50 it`; `12 it` where the end is not known. */
export function counted(loop: {
  readonly done: number;
  readonly total: number;
  readonly unit: string;
}): string {
  const number = (value: number) => String(Number(value.toPrecision(10)));
  const of = loop.total > 0 ? `/${number(loop.total)}` : '';
  return `${number(loop.done)}${of} ${loop.unit}`;
}

/** Bytes as `3.2 GB`. */
export function size(bytes: number): string {
  const units = ['B', 'kB', 'MB', 'GB', 'TB'];
  let value = bytes;
  let unit = 0;
  while (value >= 999.5 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${value >= 10 || unit === 0 ? value.toFixed(0) : value.toFixed(1)} ${units[unit] ?? ''}`;
}

/** The last part of a path. */
export function basename(path: string): string {
  return path.split('/').at(-1) ?? path;
}

/** `A10`, `A10:2`, `CPU`. */
export function accelerator(gpu: string, count: number): string {
  if (!gpu) {
    return 'CPU';
  }
  return count > 1 ? `${gpu}:${count}` : gpu;
}
