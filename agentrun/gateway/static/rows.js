// The timeline's rows: one for each event, one for each run of deltas.

import { inputText } from './message.js'
import { usable } from './session.js'
import { short, span } from './words.js'

const DELTAS = new Set(['text.delta', 'reasoning.delta', 'tool.input.delta', 'tool.progress'])
const KEPT = 400
const EXCERPT = 90

/**
 * One row. `tone` says how it looks: sent, start, text, tool, ask, warn, stop, done, gap or plain. `superseded` is
 * true once a later attempt has replaced what this row said, or its exchange has left the conversation.
 */
class Row {
  constructor(item, from) {
    this.from = from
    this.to = item.offset
    this.type = item.event?.type ?? ''
    this.turn = item.event?.turn ?? ''
    this.attempt = item.event?.attempt ?? 0
    this.time = item.time ?? 0
    this.until = this.time
    this.items = [item]
    this.left = 0
    this.worker = null
    this.title = ''
    this.note = ''
    this.tone = 'plain'
    this.tokens = 0
    this.excerpt = ''
    this.superseded = false
  }

  get range() {
    return this.from === this.to ? `${this.to}` : `${this.from}–${this.to}`
  }

  /** Another delta of the run. The middle of a long run is counted and not kept. */
  extend(item) {
    this.to = item.offset
    this.until = item.time ?? this.until
    if (this.items.length < KEPT) this.items.push(item)
    else {
      this.items[KEPT - 1] = item
      this.left += 1
    }
  }
}

class Attempts {
  constructor(offset) {
    this.offset = offset
    this.number = 0
    this.worker = null
    this.running = false
    this.since = 0
    this.rows = []
  }
}

export class Timeline {
  constructor() {
    this.rows = []
    this.offset = 0
    this.#turns = new Map()
    this.#sent = new Map()
  }

  #turns
  #sent

  /** Take in the next item; return the row it is in, or null if it was taken in before. */
  add(item) {
    if (item.offset <= this.offset) return null
    const from = this.offset + 1
    this.offset = item.offset
    const event = item.event ?? {}
    const last = this.rows.at(-1)
    const run =
      DELTAS.has(event.type) && last?.type === event.type && last.turn === event.turn && last.attempt === event.attempt
    if (run) {
      last.extend(item)
      this.#delta(last, event)
      return last
    }
    const row = new Row(item, from)
    this.rows.push(row)
    this.#describe(row, event)
    return row
  }

  #turn(row) {
    if (!this.#turns.has(row.turn)) this.#turns.set(row.turn, new Attempts(row.from))
    return this.#turns.get(row.turn)
  }

  #describe(row, event) {
    const known = usable(event)
    const [title, tone, note] = known ? DESCRIBED[row.type] : [row.type, 'plain', () => 'not known to this page']
    row.title = row.type === 'unusable' || typeof title !== 'string' || title === '' ? 'Unusable record' : title
    row.tone = tone
    row.note = note?.(event) ?? ''
    if (!known) return
    if (row.type === 'turn.started') this.#started(row, event)
    else if (DELTAS.has(row.type)) this.#delta(row, event)
    else if (row.type === 'turn.cancel') this.#stopAsked(row, event)
    else if (row.type === 'turn.requested') this.#requested(row, event)
    else if (row.type === 'turn.cancelled' && this.#sent.has(event.by)) {
      row.note = `by the message at ${this.#sent.get(event.by)}${event.rolled_back ? ', taken back' : ''}`
    }
    if (!row.turn || row.attempt === 0) return
    const turn = this.#turn(row)
    if (row.attempt >= turn.number) row.worker = turn.worker
    turn.rows.push(row)
    if (/^turn\.(released|retrying|suspended|completed|cancelled|failed|expired)$/.test(row.type)) turn.running = false
    if (row.type === 'turn.cancelled' && event.rolled_back) this.#takenBack(turn)
    if (row.type === 'turn.completed' && row.note === '' && turn.since > 0)
      row.note = `after ${span(row.time - turn.since)}`
  }

  #started(row, event) {
    const turn = this.#turn(row)
    const resumes = (event.resumes_from ?? null) !== null
    if (turn.running) {
      row.title = 'Taken over'
      row.tone = 'warn'
      row.note = `${turn.worker} was lost; ${event.worker} ${resumes ? `goes on after ${event.resumes_from}` : 'starts over'}`
    } else if (row.attempt > 1) {
      row.title = resumes ? 'Went on' : 'Started over'
      row.note = resumes ? `by ${event.worker}, after ${event.resumes_from}` : `by ${event.worker}`
    }
    if (!resumes) for (const before of turn.rows) before.superseded ||= SAYS.has(before.type)
    turn.number = row.attempt
    turn.worker = event.worker
    turn.since ||= row.time
    turn.running = true
  }

  #delta(row, event) {
    row.tokens += event.count ?? 1
    if (typeof event.text === 'string' && row.excerpt.length <= EXCERPT) row.excerpt += event.text
    const unit = row.type === 'tool.input.delta' ? 'piece' : row.type === 'tool.progress' ? 'report' : 'token'
    row.note = `${row.tokens} ${unit}${row.tokens === 1 ? '' : 's'} · ${short(row.excerpt, EXCERPT)}`
  }

  #stopAsked(row, event) {
    row.note = [event.all ? 'everything sent before' : '', who(event)].filter(Boolean).join(' ')
  }

  #takenBack(turn) {
    for (const before of turn.rows) before.superseded ||= SAYS.has(before.type)
  }

  #requested(row, event) {
    if (!this.#sent.has(event.turn)) this.#sent.set(event.turn, row.to)
    const first = this.#turns.get(event.replaces)
    if (!first) return
    for (const turn of this.#turns.values()) {
      if (turn.offset < first.offset) continue
      for (const before of turn.rows) before.superseded ||= SAYS.has(before.type)
    }
  }
}

const SAYS = new Set([
  'text.delta',
  'reasoning.delta',
  'tool.input.delta',
  'tool.progress',
  'tool.call',
  'tool.result',
  'data',
  'source',
  'file',
  'snapshot',
  'turn.checkpoint',
])

function who(event) {
  return [event.by ? `by ${event.by}` : '', event.reason ?? ''].filter(Boolean).join(', ')
}

function answered(value) {
  if (typeof value === 'boolean') return value ? 'yes' : 'no'
  if (typeof value?.approved === 'boolean')
    return `${value.approved ? 'yes' : 'no'}${value.reason ? `: ${value.reason}` : ''}`
  return short(value, EXCERPT)
}

const requested = (event) => {
  const from = event.user ?? event.device
  const busy = event.on_busy && event.on_busy !== 'enqueue' ? ` · ${event.on_busy}` : ''
  return `${from ? `${from}: ` : ''}${short(inputText(event.input), EXCERPT)}${busy}${event.replaces ? ' · in place of an earlier one' : ''}`
}

const DESCRIBED = {
  'turn.requested': ['Sent', 'sent', requested],
  'turn.answer': ['Answered', 'ask', (e) => `${e.user ? `${e.user}: ` : ''}${answered(e.value)}`],
  'turn.cancel': ['Stop asked for', 'stop'],
  'turn.started': ['Started', 'start', (e) => `by ${e.worker}`],
  'text.delta': ['Text', 'text'],
  'reasoning.delta': ['Reasoning', 'text'],
  'tool.input.delta': ['Tool input', 'tool'],
  'tool.progress': ['Tool progress', 'tool'],
  'tool.call': ['Tool called', 'tool', (e) => `${e.name}(${short(e.input, EXCERPT)})`],
  'tool.result': [
    'Tool result',
    'tool',
    (e) => ((e.error ?? null) === null ? short(e.output ?? null, EXCERPT) : `error: ${short(e.error, EXCERPT)}`),
  ],
  data: ['Data', 'tool', (e) => `${e.name}: ${short(e.data, EXCERPT)}`],
  source: ['Source', 'tool', (e) => e.title ?? e.url],
  file: ['File', 'tool', (e) => e.name ?? e.url],
  'input.required': ['Asks', 'ask', (e) => `${e.kind}: ${short(e.prompt || e.tool || '', EXCERPT)}`],
  'turn.suspended': ['Suspended', 'ask', () => 'waits without a worker'],
  'turn.resumed': ['Took the answer', 'start', (e) => `of ${e.answer}`],
  'turn.retrying': ['Retry', 'warn', (e) => `${short(e.error?.message ?? '', EXCERPT)} · again in ${e.after ?? 0} s`],
  'turn.released': ['Handed over', 'warn', (e) => e.reason ?? 'drain'],
  'turn.lost': ['Lost', 'warn', (e) => `${e.worker} is silent, says ${e.by}`],
  'turn.checkpoint': ['Checkpoint', 'plain', () => 'the message so far'],
  'steer.consumed': ['Took in', 'start', (e) => `what was sent at ${e.offset}`],
  'input.rejected': ['Rejected', 'stop', (e) => `the input at ${e.offset}: ${e.reason}`],
  'turn.completed': [
    'Completed',
    'done',
    (e) => (e.finish_reason && e.finish_reason !== 'stop' ? e.finish_reason : usage(e.usage)),
  ],
  'turn.cancelled': ['Stopped', 'stop', (e) => [who(e), e.rolled_back ? 'taken back' : ''].filter(Boolean).join(' · ')],
  'turn.failed': ['Failed', 'stop', (e) => short(e.error?.message ?? '', EXCERPT)],
  'turn.expired': ['Expired', 'stop', (e) => e.reason ?? ''],
  snapshot: ['Snapshot', 'gap', (e) => `${e.from}–${e.to} have expired; this is how the message stood`],
  gap: ['Gap', 'gap', (e) => `${e.from}–${e.to} are gone (${e.reason ?? 'expired'})`],
  chunk: ['Piece', 'plain', (e) => `${e.index + 1} of ${e.total}`],
}

function usage(use) {
  return use ? `${use.input_tokens ?? 0} tokens in, ${use.output_tokens ?? 0} out` : ''
}
