// Messages on their way. Each has its id from the start, so that sending it again is safe: it is sent until it is
// stored or refused, one after the other, also after a reload.

import { store } from './store.js'

const FIRST_PAUSE = 500
const LONGEST_PAUSE = 8_000

export class Outbox {
  /** @param onChange is called when an entry is new, gone, or has met a problem */
  constructor(api, onChange) {
    this.api = api
    this.onChange = onChange
    this.entries = store.outbox
    this.busy = false
    this.wake = null
    addEventListener('online', () => this.wake?.())
  }

  of(session) {
    return this.entries.filter((entry) => entry.session === session)
  }

  add(session, body) {
    this.entries.push({ session, body, problem: '', failed: false })
    this.#changed()
    this.run()
  }

  again(id) {
    for (const entry of this.entries) if (entry.body.id === id) Object.assign(entry, { problem: '', failed: false })
    this.#changed()
    this.run()
  }

  remove(id) {
    const left = this.entries.filter((entry) => entry.body.id !== id)
    if (left.length === this.entries.length) return
    this.entries = left
    this.#changed()
  }

  async run() {
    if (this.busy) return this.wake?.()
    this.busy = true
    let failures = 0
    let entry
    while ((entry = this.entries.find((e) => !e.failed))) {
      try {
        await this.api.send(entry.session, entry.body)
        this.remove(entry.body.id)
        failures = 0
      } catch (problem) {
        entry.problem = problem.message
        entry.failed = !problem.passing
        this.#changed()
        if (!entry.failed) await this.#pause(Math.min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** Math.min(failures++, 5)))
      }
    }
    this.busy = false
  }

  #pause(milliseconds) {
    return new Promise((resolve) => {
      const timer = setTimeout(() => this.wake?.(), milliseconds)
      this.wake = () => {
        clearTimeout(timer)
        this.wake = null
        resolve()
      }
    })
  }

  #changed() {
    store.outbox = this.entries
    this.onChange()
  }
}
