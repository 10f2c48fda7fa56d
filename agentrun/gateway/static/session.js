// The fold of a session's events: its turns, and what each of them said. The same fold as agentrun.history.History;
// tests/browser/test_fold.py holds the two against each other.

import { MessageBuilder } from './message.js'

const ENDED = new Set(['completed', 'cancelled', 'failed', 'expired', 'consumed', 'rejected'])
const TERMINAL = new Set(['turn.completed', 'turn.cancelled', 'turn.failed', 'turn.expired'])

// What an event must have to be one: an event that lacks it is passed over, like one of an unknown type.
// s: a string, n: a number, a: an array, o: an object, x: anything at all.
const REQUIRED = {
  'turn.requested': { turn: 's', agent: 's', input: 'x' },
  'turn.answer': { turn: 's', request: 's', value: 'x' },
  'turn.cancel': {},
  'turn.started': { worker: 's', lease: 's' },
  'text.delta': { text: 's' },
  'reasoning.delta': { text: 's' },
  'tool.input.delta': { call: 's', text: 's' },
  'tool.call': { call: 's', name: 's', input: 'x' },
  'tool.progress': { call: 's', data: 'x' },
  'tool.result': { call: 's' },
  data: { name: 's', data: 'x' },
  source: { url: 's' },
  file: { url: 's', media_type: 's' },
  'input.required': { request: 's', kind: 's' },
  'turn.suspended': { requests: 'a', message: 'o' },
  'turn.resumed': { request: 's', answer: 'n' },
  'turn.retrying': { error: 'o' },
  'turn.released': {},
  'turn.lost': { worker: 's', by: 's' },
  'turn.checkpoint': { message: 'o' },
  'steer.consumed': { steer: 's', offset: 'n' },
  'input.rejected': { offset: 'n', code: 's', reason: 's' },
  chunk: { index: 'n', total: 'n', data: 's' },
  'turn.completed': { turn_offset: 'n' },
  'turn.cancelled': { turn_offset: 'n' },
  'turn.failed': { turn_offset: 'n', error: 'o' },
  'turn.expired': { turn_offset: 'n' },
  snapshot: { message: 'o' },
  gap: {},
}
const IS = {
  s: (value) => typeof value === 'string',
  n: (value) => typeof value === 'number',
  a: Array.isArray,
  o: (value) => typeof value === 'object' && value !== null,
  x: (value) => value !== undefined,
}

/** Whether the event is of a known type and has what that type needs. */
export function usable(event) {
  const fields = Object.hasOwn(REQUIRED, event?.type) ? REQUIRED[event.type] : null
  return fields !== null && Object.entries(fields).every(([name, kind]) => IS[kind](event[name]))
}

const partsOf = (message) => (Array.isArray(message?.parts) ? message.parts : [])

export class TurnView {
  constructor(id, offset, request = null) {
    this.id = id
    this.offset = offset
    this.agent = request?.agent ?? ''
    this.request = request
    this.state = 'queued'
    this.attempt = 0
    this.worker = null
    this.last_out = 0
    this.usage = null
    this.error = null
    this.finish_reason = null
    this.by = null
    this.reason = null
    this.rolled_back = false
    this.ended_at = null
    this.consumed_by = null
    this.steers = []
    this.questions = new Map()
    this.stop = null
    this.interrupted_by = null
    this.rollback = false
    this.replaced_by = null
    this.suspended_until = null
    this.retry_at = null
    // For the page only: when it was sent, first started and ended, in seconds since the epoch; what befell it.
    this.times = { sent: null, started: null, ended: null }
    this.notices = []
    this.own = new MessageBuilder()
    this.ownIncomplete = false
    this.earlier = []
    this.earlierIncomplete = false
    this.uncharged = 0
    this.version = 0
  }

  get ended() {
    return ENDED.has(this.state)
  }

  /** Whether a question of it is open. */
  get asks() {
    return !this.ended && [...this.questions.values()].some((question) => question.answer === null)
  }

  get charged() {
    return this.attempt - this.uncharged
  }

  /** What to show now. What an earlier attempt said stays until the current one says something. */
  get parts() {
    return this.own.empty ? this.earlier : this.own.parts
  }

  /** Changes when `parts` were replaced, not only grown. */
  get generation() {
    return `${this.version}.${this.own.version}.${this.own.empty}`
  }

  /** What is shown was said by an attempt before the current one, which replaces it if it speaks. */
  get outdated() {
    return this.own.empty && this.earlier.length > 0 && this.state === 'running'
  }

  get incomplete() {
    return this.ownIncomplete || (this.earlierIncomplete && this.own.empty)
  }

  get tokens() {
    return this.own.tokens
  }

  #authoritative(message) {
    // An empty message never blanks what is shown.
    const parts = partsOf(message)
    if (parts.length === 0) return
    this.own.replace(parts)
    this.ownIncomplete = false
  }

  output(offset, event, time) {
    if (event.type === 'turn.started') this.#started(event, time)
    else if (TERMINAL.has(event.type)) this.#terminal(offset, event, time)
    else {
      this.attempt = Math.max(this.attempt, event.attempt ?? 0)
      this.#said(offset, event, time)
    }
    this.last_out = offset
  }

  #said(offset, event, time) {
    switch (event.type) {
      case 'snapshot':
      case 'turn.checkpoint':
        this.#authoritative(event.message)
        break
      case 'input.required':
        if (!this.questions.has(event.request)) {
          const after = this.parts.length
          this.questions.set(event.request, { event, offset, after, answer: null, answer_offset: null, resumed: false })
        }
        break
      case 'turn.resumed': {
        const question = this.questions.get(event.request)
        if (question) question.resumed = true
        break
      }
      case 'turn.suspended':
        this.#authoritative(event.message)
        this.#pause('suspended', event.usage, false)
        this.suspended_until = event.until ?? null
        break
      case 'turn.retrying':
        this.#pause('retrying', event.usage, true)
        this.error = event.error
        this.notices.push(`Attempt ${event.attempt ?? 0} failed: ${event.error.message ?? ''}`)
        this.retry_at = time + (event.after ?? 0)
        break
      case 'turn.lost':
        break
      case 'turn.released':
        this.#pause('queued', event.usage, false)
        break
      default:
        this.own.apply(event)
    }
  }

  #started(event, time) {
    const parts = partsOf(event.message)
    const told = parts.length > 0
    const resumes = (event.resumes_from ?? null) !== null
    this.earlierIncomplete = this.incomplete && !told
    this.earlier = told ? parts : this.parts
    this.own = new MessageBuilder(resumes ? this.earlier : [])
    this.ownIncomplete = this.earlierIncomplete && resumes
    this.version += 1
    if (this.state === 'running') {
      const how = resumes ? 'went on from there' : 'started over'
      this.notices.push(`Worker ${this.worker} was lost in mid-answer; worker ${event.worker} ${how}.`)
    }
    this.state = 'running'
    this.attempt = event.attempt ?? 0
    this.worker = event.worker
    this.error = this.suspended_until = this.retry_at = null
    this.times.started ??= time
  }

  #pause(state, usage, charged) {
    if (this.state === 'running' && !charged) this.uncharged += 1
    this.state = state
    this.usage = usage ?? this.usage
  }

  #terminal(offset, event, time) {
    this.#authoritative(event.message)
    this.usage = event.usage ?? this.usage
    this.error = this.suspended_until = this.retry_at = null
    this.state = event.type.slice('turn.'.length)
    if (this.state === 'completed') this.finish_reason = event.finish_reason ?? 'stop'
    if (this.state === 'failed') this.error = event.error
    if (this.state === 'expired') this.reason = event.reason ?? null
    if (this.state === 'cancelled') {
      this.by = event.by ?? null
      this.reason = event.reason ?? null
      this.rolled_back = event.rolled_back ?? false
    }
    this.end(this.state, offset, time)
  }

  end(state, offset, time) {
    this.state = state
    this.ended_at = offset
    this.times.ended = time
  }
}

/** A session, folded from its events. */
export class Session {
  constructor() {
    this.offset = 0
    /** @type {Map<string, TurnView>} all turns, in the order sent */
    this.turns = new Map()
    this.#at = new Map()
    this.#answers = new Map()
  }

  #at
  #answers
  #running = null
  #pieces = []

  /** The first turn that has not ended. */
  get active() {
    for (const view of this.turns.values()) if (!view.ended) return view
    return null
  }

  /** Take in the next item; return the turns it changed. Offsets applied before change nothing. */
  apply(item) {
    const { offset, time = 0 } = item
    if (offset <= this.offset) return []
    this.offset = offset
    const event = usable(item.event) ? this.#join(item.event) : null
    if (event === null) return []
    switch (event.type) {
      case 'chunk':
        return this.#one(event.turn)
      case 'turn.requested':
        return this.#requested(offset, event, time)
      case 'turn.answer':
        return this.#answered(offset, event)
      case 'turn.cancel':
        return this.#stopped(offset, event)
      case 'input.rejected':
        return this.#rejected(offset, event, time)
      case 'gap':
        if (this.#running === null) return []
        this.#running.ownIncomplete = true
        return [this.#running]
      default:
        return this.#output(offset, event, time)
    }
  }

  #one(turn) {
    const view = this.turns.get(turn)
    return view ? [view] : []
  }

  /** Put the pieces of an event together; null inside a run of them. */
  #join(event) {
    if (event.type !== 'chunk') return event
    if (event.index === 0) this.#pieces = []
    this.#pieces.push(event)
    if (event.index !== event.total - 1) return null
    const pieces = this.#pieces
    this.#pieces = []
    if (pieces.length !== event.total || pieces.some((piece, index) => piece.index !== index)) return event
    try {
      const whole = JSON.parse(pieces.map((piece) => piece.data).join(''))
      return usable(whole) ? whole : null
    } catch {
      return null
    }
  }

  #requested(offset, event, time) {
    const known = this.turns.get(event.turn)
    if (known) return [known]
    const changed = []
    if (event.on_busy === 'interrupt' || event.on_busy === 'rollback') {
      for (const view of this.#unended()) {
        if (view.interrupted_by !== null) continue
        view.interrupted_by = event.turn
        view.rollback = event.on_busy === 'rollback'
        changed.push(view)
      }
    }
    changed.push(...this.#replace(event))
    const view = new TurnView(event.turn, offset, event)
    view.times.sent = time
    this.turns.set(event.turn, view)
    this.#at.set(offset, view)
    return [...changed, view]
  }

  #replace(event) {
    if (!this.turns.has(event.replaces)) return []
    // By the order they were sent in: where requests were trimmed, several turns have offset 0.
    const views = [...this.turns.values()]
    const after = views.slice(views.findIndex((view) => view.id === event.replaces))
    for (const view of after) view.replaced_by ??= event.turn
    return after
  }

  #answered(offset, event) {
    const view = this.turns.get(event.turn)
    if (!view) return []
    this.#answers.set(offset, view)
    const question = view.questions.get(event.request)
    if (question && question.answer === null && !view.ended) {
      question.answer = event
      question.answer_offset = offset
    }
    return [view]
  }

  #stopped(offset, event) {
    const views = event.all ? this.#unended() : this.#one(event.turn)
    for (const view of views) if (view.stop === null && !view.ended) view.stop = event
    if (views.length > 0) this.#answers.set(offset, views[0])
    return views
  }

  #rejected(offset, event, time) {
    let view = this.#at.get(event.offset)
    if (view) {
      if (!view.ended) {
        view.end('rejected', offset, time)
        view.reason = event.reason
        view.last_out = offset
      }
      return [view]
    }
    view = this.#answers.get(event.offset)
    for (const question of view?.questions.values() ?? []) {
      // An answer that cannot be used leaves the question open.
      if (question.answer_offset === event.offset) question.answer = question.answer_offset = null
    }
    return view ? [view] : []
  }

  #output(offset, event, time) {
    if (!event.turn) return []
    const ends = TERMINAL.has(event.type)
    let view = this.turns.get(event.turn)
    if (!view) {
      // Its request was trimmed.
      view = new TurnView(event.turn, ends ? event.turn_offset : 0)
      this.turns.set(event.turn, view)
    }
    if (view.ended || ((event.attempt ?? 0) < view.attempt && !ends)) return [view]
    const changed = [view]
    if (event.type === 'steer.consumed') changed.push(...this.#consumed(offset, view, event, time))
    view.output(offset, event, time)
    if (view.state === 'running') this.#running = view
    else if (this.#running === view) this.#running = null
    return changed
  }

  #consumed(offset, by, event, time) {
    const steer = this.turns.get(event.steer)
    if (!steer || steer.ended) return []
    steer.end('consumed', offset, time)
    steer.consumed_by = by.id
    by.steers.push(steer.id)
    return [steer]
  }

  #unended() {
    return [...this.turns.values()].filter((view) => !view.ended)
  }
}
