/** The extension's logic without a browser; run by test_logic.py after the extension was built. */

import assert from 'node:assert/strict';
import test from 'node:test';
import {
  afterSaving,
  changesOf,
  isOverruled
} from '../../lib/labextension/src/form.js';
import {
  counted,
  duration,
  size,
  usd
} from '../../lib/labextension/src/format.js';
import {
  choiceOf,
  readChoice,
  withChoice,
  written
} from '../../lib/labextension/src/magic.js';
import {
  cheapest,
  costAt,
  isIdle,
  nextEnd,
  todayAt
} from '../../lib/labextension/src/state.js';

test('a choice is read from the first line only', () => {
  assert.equal(choiceOf('x = 1'), null);
  assert.equal(choiceOf('%%remotely\n1'), null);
  assert.equal(choiceOf('\n%%remote gpu=A10'), null);
  assert.deepEqual(choiceOf('%%remote'), {});
  assert.deepEqual(choiceOf('%%remote gpu=A10:2 idle=5m on=ssh:me@box\nf()'), {
    gpu: 'A10:2',
    on: 'ssh:me@box'
  });
  assert.deepEqual(choiceOf('%%remote gpu="RTX 4090"'), { gpu: 'RTX 4090' });
});

test('a line is written, changed and taken away; other keys and the code stay', () => {
  const code = 'a = "$&"\nb';
  assert.equal(withChoice(code, {}), `%%remote\n${code}`);
  const once = withChoice(code, { gpu: 'A10', on: 'modal' });
  assert.equal(once, `%%remote gpu=A10 on=modal\n${code}`);
  assert.equal(withChoice(once, null), code);
  assert.equal(
    withChoice('%%remote detach gpu=T4 name="a b"\nx', { gpu: 'L4' }),
    '%%remote gpu=L4 detach name="a b"\nx'
  );
  assert.equal(withChoice(code, null), code);
  assert.equal(withChoice('%%remote', null), '');
});

test('nothing but names gets into code', () => {
  for (const gpu of ['A10\nimport os', '"; x', '$(x)', "a' b", '--x']) {
    assert.throws(() => written({ gpu }), RangeError);
    assert.equal(readChoice(`gpu=${gpu}`), null);
  }
  assert.equal(readChoice('gpu=A10 budget=900'), null);
  assert.equal(readChoice({ gpu: 'A10' }), null);
  assert.deepEqual(readChoice('gpu=A10|L4 on=modal'), {
    gpu: 'A10|L4',
    on: 'modal'
  });
});

test('values in words', () => {
  assert.deepEqual([0, 0.1, 1.254, 0.0042, 0.00001].map(usd), [
    ...['$0.00', '$0.10', '$1.25', '$0.0042', '<$0.0001']
  ]);
  assert.deepEqual([0, 59.4, 60, 3599.6, 7260, 90000].map(duration), [
    '0s',
    '59s',
    '1m00s',
    '1h00m',
    '2h01m',
    '1d1h'
  ]);
  assert.deepEqual([999, 1000, 24e9].map(size), ['999 B', '1.0 kB', '24 GB']);
});

const machine = {
  state: 'running',
  usd: 1,
  usd_per_hour: 3.6,
  busy: false,
  idle_seconds: 61,
  ends: [
    { cause: 'idle', at: 10 },
    { cause: 'lease', at: 20 },
    { cause: 'time', at: 30 }
  ]
};
const state = { now: 100, spent: { usd_today: 2, usd_per_hour: 3.6 } };

test('how far a loop is', () => {
  const loop = { done: 12, total: 50, unit: 'it' };
  assert.equal(counted(loop), '12/50 it');
  assert.equal(counted({ ...loop, done: 1234567, total: 0 }), '1234567 it');
  assert.equal(counted({ done: 0.3 - 0.1, total: 1, unit: 'h' }), '0.2/1 h');
});

test('costs tick while machines run, and never backwards', () => {
  assert.equal(costAt(machine, state, 110), 1.01);
  assert.equal(costAt(machine, state, 90), 1);
  assert.equal(costAt({ ...machine, usd: null }, state, 110), null);
  assert.equal(costAt({ ...machine, state: 'starting' }, state, 110), 1);
  assert.equal(todayAt(state, 110), 2.01);
});

test('what is idle, and what ends it next', () => {
  assert.ok(isIdle(machine));
  for (const other of [{ busy: true }, { busy: null }, { idle_seconds: 5 }]) {
    assert.ok(!isIdle({ ...machine, ...other }));
  }
  assert.equal(nextEnd(machine).cause, 'idle');
  assert.equal(nextEnd({ ...machine, busy: true }).cause, 'time');
  assert.equal(nextEnd({ ...machine, ends: [] }), null);
});

test('one offer of each GPU, the cheapest', () => {
  const offer = (gpu, usd_per_hour, count = 1, spot = false) => ({
    ...{ gpu, usd_per_hour, count, spot }
  });
  assert.deepEqual(
    cheapest([
      ...[offer('B', 3), offer('A', 2), offer('A', 1), offer('B', 1, 1, true)],
      offer('A', 0.5, 2)
    ]),
    [offer('A', 1), offer('B', 3)]
  );
});

test('only what was changed is saved, and what is typed meanwhile stays', () => {
  const settings = {
    file: '/c.toml',
    items: [
      { name: 'gpu', own: 'A10', origin: '/c.toml' },
      { name: 'idle', own: '', origin: 'default' },
      { name: 'on', own: 'box', origin: '/c.toml [targets.box]' }
    ]
  };
  const draft = { gpu: ' L4 ', idle: ' ', on: '' };
  assert.deepEqual(changesOf(settings, draft), { gpu: 'L4', on: '' });
  assert.deepEqual(changesOf(settings, { gpu: 'A10 ' }), {});
  assert.deepEqual(afterSaving({ ...draft, gpu: 'L40S' }, draft), {
    gpu: 'L40S'
  });
  assert.deepEqual(
    settings.items.map(it => isOverruled(it, settings.file)),
    [false, false, true]
  );
});
