// Following a session: what is stored as JSON pages, then live by EventSource, and back again whenever that breaks.

import { Problem } from './api.js'

const FIRST_PAUSE = 500
const LONGEST_PAUSE = 10_000
const SILENCE = 15_000
const LOOK = 5_000
const HIDDEN = 60_000
const OPENING = 8_000
const SHORTEST_PATIENCE = 3_000
const LONGEST_PATIENCE = 24_000
const TRIES = 3
const POLL = 25
const POLLING = 120_000

/**
 * `onItems(items)` gets each item once, in order. `onState({kind, detail})` tells how the connection stands: loading,
 * live, polling, reconnecting, broker, offline, paused, token, refused. `onReset()`: the session was deleted and begins
 * again at offset 0.
 */
export class Follower {
  constructor({ api, session, onItems, onState, onReset }) {
    this.offset = 0
    this.state = 'loading'
    Object.assign(this, { api, session, onItems, onState, onReset })
  }

  #abort = new AbortController()
  #source = null
  #leave = null
  #wake = null
  #heard = 0
  #hiddenTimer = 0
  // A request may go out on a connection that died without a word; it is given up soon, the next one less soon.
  #patience = SHORTEST_PATIENCE
  #stillborn = 0

  start() {
    const signal = this.#abort.signal
    addEventListener('online', () => this.check(), { signal })
    addEventListener('offline', () => this.#probe(), { signal })
    addEventListener('pageshow', (event) => event.persisted && this.check(), { signal })
    document.addEventListener('visibilitychange', () => this.#visibility(), { signal })
    const timer = setInterval(() => this.#watch(), LOOK)
    signal.addEventListener('abort', () => clearInterval(timer))
    this.#run()
  }

  stop() {
    this.#abort.abort()
    clearTimeout(this.#hiddenTimer)
    this.#end()
    this.#wake?.()
  }

  /** See now whether all is as it should be: after the network came back, after a nap, with a new token. */
  check() {
    if (this.#wake) this.#wake()
    else if (this.#source) this.#probe()
  }

  async #run() {
    let failures = 0
    while (!this.#abort.signal.aborted) {
      try {
        await this.#catchUp()
        failures = 0
        if (this.#stillborn >= TRIES) await this.#poll()
        else await this.#stream()
        if (document.hidden && this.state === 'paused') await this.#sleep(Infinity)
      } catch (problem) {
        if (this.#abort.signal.aborted) return
        const pause = this.#failed(problem, failures++)
        await this.#sleep(pause)
      }
    }
  }

  #failed(problem, failures) {
    const status = problem instanceof Problem ? problem.status : 0
    if (status === 0) this.#patience = Math.min(LONGEST_PATIENCE, 2 * this.#patience)
    if (status === 410) {
      this.offset = 0
      this.onReset()
      return 0
    }
    if (status === 401) {
      this.#say('token', problem.message)
      return Infinity
    }
    if (status >= 400 && !problem.passing) {
      this.#say('refused', problem.message)
      return Infinity
    }
    if (!navigator.onLine) this.#say('offline')
    else if (status === 503) this.#say('broker', problem.message)
    else this.#say('reconnecting', problem.message)
    return Math.min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** Math.min(failures, 6)) * (0.75 + Math.random() / 2)
  }

  async #catchUp() {
    for (;;) {
      const page = await this.#events()
      if (this.#abort.signal.aborted) return
      this.#patience = SHORTEST_PATIENCE
      this.#take(page.events)
      this.offset = Math.max(this.offset, page.offset)
      if (page.events.length === 0) return
    }
  }

  #events(options) {
    return this.api.events(this.session, this.offset, {
      timeout: this.#patience,
      signal: this.#abort.signal,
      ...options,
    })
  }

  #take(items) {
    const fresh = items.filter((item) => item.offset > this.offset)
    if (fresh.length === 0) return
    this.offset = fresh.at(-1).offset
    this.onItems(fresh)
  }

  /** Follow live until the connection is gone for good; an EventSource mends most breaks by itself. */
  #stream() {
    return new Promise((resolve) => {
      const source = new EventSource(this.api.eventsUrl(this.session, this.offset))
      let opened = false
      const leave = () => {
        clearTimeout(slow)
        source.close()
        if (this.#source === source) this.#source = this.#leave = null
        if (!opened) this.#stillborn += 1
        resolve()
      }
      const slow = setTimeout(() => opened || leave(), OPENING)
      this.#source = source
      this.#leave = leave
      this.#heard = performance.now()
      source.onopen = () => {
        opened = true
        this.#stillborn = 0
        this.#heard = performance.now()
        // While its broker is away the gateway opens streams and ends them again.
        if (this.state === 'broker') this.#probe()
        else this.#say('live')
      }
      source.onmessage = (message) => {
        this.#heard = performance.now()
        this.#say('live')
        this.#take([JSON.parse(message.data)])
      }
      source.onerror = () => {
        if (source.readyState === EventSource.CLOSED || !opened) return leave()
        if (this.state !== 'broker') this.#say(navigator.onLine ? 'reconnecting' : 'offline')
        // It retries by itself, but cannot tell why it fails; a plain request can.
        this.#probe()
      }
    })
  }

  /** For networks that let no stream through. */
  async #poll() {
    const end = performance.now() + POLLING
    while (performance.now() < end) {
      this.#say('polling')
      const page = await this.#events({ wait: POLL })
      if (this.#abort.signal.aborted) return
      this.#take(page.events)
    }
    this.#stillborn -= 1
  }

  #probing = false

  /** Ask how the gateway is, and for what follows: if there is something the stream does not bring, begin a new one. */
  async #probe(deep = true) {
    if (this.#probing) return
    this.#probing = true
    const source = this.#source
    try {
      await this.api.ready({ timeout: this.#patience, signal: this.#abort.signal })
      const page = deep ? await this.#events({ limit: 1 }) : { events: [], offset: 0 }
      if (this.#source !== source) return
      if (page.events.length > 0) {
        await new Promise((resolve) => setTimeout(resolve, 1000))
        if (this.offset < page.offset && this.#source === source) this.#end()
      } else if (source?.readyState === EventSource.OPEN) this.#say('live')
    } catch (problem) {
      if (this.#abort.signal.aborted || this.#source !== source) return
      const dead = problem.status === 0 && performance.now() - this.#heard > SHORTEST_PATIENCE
      if (!problem.passing || (dead && navigator.onLine)) this.#end()
      else if (problem.status === 503) this.#say('broker', problem.message)
      else if (!navigator.onLine) this.#say('offline')
      else if (source?.readyState !== EventSource.OPEN) this.#say('reconnecting', problem.message)
    } finally {
      this.#probing = false
    }
  }

  #watch() {
    if (!this.#source || document.hidden) return
    const silent = performance.now() - this.#heard > SILENCE
    if (silent) this.#heard = performance.now()
    this.#probe(silent || this.state !== 'live')
  }

  // Browsers open six connections to a host: a tab that nobody sees gives its one back.
  #visibility() {
    clearTimeout(this.#hiddenTimer)
    if (!document.hidden) this.check()
    else {
      this.#hiddenTimer = setTimeout(() => {
        if (!this.#source) return
        this.#say('paused')
        this.#end()
      }, HIDDEN)
    }
  }

  #end() {
    this.#leave?.()
  }

  #sleep(milliseconds) {
    return new Promise((resolve) => {
      const timer = milliseconds === Infinity ? 0 : setTimeout(() => this.#wake?.(), milliseconds)
      this.#wake = () => {
        clearTimeout(timer)
        this.#wake = null
        resolve()
      }
    })
  }

  #say(kind, detail = '') {
    if (this.state === kind && kind === 'live') return
    this.state = kind
    this.onState({ kind, detail })
  }
}
