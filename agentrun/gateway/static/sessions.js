// The list of sessions: those seen in this browser, and those the gateway lists.

import { inputText } from './message.js'
import { h, setText, show } from './dom.js'
import { store } from './store.js'
import { ago, short } from './words.js'

const TITLE = 48
const TITLES = 12

export const titleOf = (request) => short(inputText(request.input), TITLE)

class Entry {
  constructor(id, onOpen) {
    this.title = h('span', { class: 'title', dir: 'auto' })
    this.busy = h('span', { class: 'busy', hidden: true }, 'answering')
    this.time = h('span', { class: 'time' })
    this.link = h(
      'a',
      {
        href: `?session=${encodeURIComponent(id)}`,
        on: {
          click: (event) => {
            if (event.ctrlKey || event.metaKey || event.shiftKey || event.button !== 0) return
            event.preventDefault()
            onOpen(id)
          },
        },
      },
      this.title,
      h('span', { class: 'sub' }, this.busy, this.time),
    )
    this.element = h('li', {}, this.link)
  }
}

export class SessionList {
  constructor(list, api, onOpen) {
    this.list = list
    this.api = api
    this.onOpen = onOpen
    this.entries = new Map()
    this.listed = []
    this.titles = new Map()
    this.current = ''
  }

  /** Ask the gateway for its newest sessions, if it lists them. */
  async refresh() {
    try {
      this.listed = (await this.api.sessions()).sessions
    } catch {
      // it lists none, or is away: what this browser knows is shown
    }
    this.draw()
    await this.#nameThem()
  }

  async #nameThem() {
    const known = new Set(store.sessions().map((entry) => entry.id))
    const nameless = this.listed
      .slice(0, 3 * TITLES)
      .filter(({ session }) => !known.has(session) && !this.titles.has(session))
    for (const { session } of nameless.slice(0, TITLES)) {
      try {
        const { events } = await this.api.events(session, 0, { limit: 1 })
        this.titles.set(session, events[0]?.event?.type === 'turn.requested' ? titleOf(events[0].event) : '')
      } catch {
        return
      }
    }
    if (nameless.length > 0) this.draw()
  }

  draw() {
    const sessions = new Map()
    for (const { session, time, busy } of this.listed)
      sessions.set(session, { title: this.titles.get(session), time, busy })
    for (const { id, title, time } of store.sessions()) {
      const known = sessions.get(id)
      sessions.set(id, { title, time: Math.max(time ?? 0, known?.time ?? 0), busy: known?.busy ?? false })
    }
    const newest = [...sessions].sort(([, a], [, b]) => b.time - a.time)
    for (const [id, entry] of this.entries) {
      if (sessions.has(id)) continue
      entry.element.remove()
      this.entries.delete(id)
    }
    newest.forEach(([id, { title, time, busy }], index) => {
      let entry = this.entries.get(id)
      if (!entry) this.entries.set(id, (entry = new Entry(id, this.onOpen)))
      setText(entry.title, title || id)
      setText(entry.time, ago(time))
      show(entry.busy, busy)
      if (id === this.current) entry.link.setAttribute('aria-current', 'page')
      else entry.link.removeAttribute('aria-current')
      if (this.list.children[index] !== entry.element)
        this.list.insertBefore(entry.element, this.list.children[index] ?? null)
    })
  }
}
