// The timeline pane. Only the rows in sight are in the document, however many there are.

import { h, setText, show } from './dom.js'
import { clockTime, span } from './words.js'

const HEIGHT = 48
const SPARE = 6
const NEAR = 60

class RowView {
  constructor(onPick) {
    this.range = h('span', { class: 'range' })
    this.title = h('span', { class: 'what' })
    this.badge = h('span', { class: 'badge' })
    this.time = h('span', { class: 'time' })
    this.note = h('span', { class: 'note' })
    this.button = h(
      'button',
      { type: 'button', class: 'row', tabindex: '-1', on: { click: () => onPick(this.index) } },
      this.range,
      h('span', { class: 'rail' }),
      h('span', { class: 'head' }, this.title, this.badge, this.time),
      this.note,
    )
    this.element = h('li', {}, this.button)
  }

  update(index, row, total, turns, picked) {
    this.index = index
    this.element.style.top = `${index * HEIGHT}px`
    this.element.setAttribute('aria-posinset', index + 1)
    this.element.setAttribute('aria-setsize', total)
    this.button.dataset.tone = row.tone
    this.button.dataset.turn = String(turns.indexOf(row.turn) % 2)
    this.button.classList.toggle('superseded', row.superseded)
    this.button.setAttribute('aria-pressed', String(picked))
    setText(this.range, row.range)
    setText(this.title, row.title)
    setText(
      this.badge,
      [row.attempt > 1 ? `attempt ${row.attempt}` : '', row.superseded ? 'superseded' : ''].filter(Boolean).join(' · '),
    )
    const took = row.until - row.time
    setText(this.time, took >= 0.1 ? span(took) : clockTime(row.time))
    setText(this.note, row.note)
  }
}

export class TimelineView {
  /** @param model the `Timeline` shown, which grows */
  constructor({ scroller, list, detail, empty }) {
    Object.assign(this, { scroller, list, detail, empty })
    this.views = []
    this.model = null
    this.picked = null
    this.focused = 0
    this.following = true
    scroller.addEventListener('scroll', () => this.#scrolled(), { passive: true })
    list.addEventListener('keydown', (event) => this.#key(event))
    detail.querySelector('button').addEventListener('click', () => this.pick(null))
    new ResizeObserver(() => this.update()).observe(scroller)
  }

  reset(model) {
    this.model = model
    this.turns = []
    this.counted = 0
    this.focused = 0
    this.following = true
    this.pick(null)
  }

  update() {
    if (this.model === null || this.scroller.clientHeight === 0) return
    const { rows } = this.model
    for (; this.counted < rows.length; this.counted += 1) {
      const { turn } = rows[this.counted]
      if (turn && this.turns.at(-1) !== turn && !this.turns.includes(turn)) this.turns.push(turn)
    }
    show(this.empty, rows.length === 0)
    this.list.style.height = `${rows.length * HEIGHT}px`
    if (this.following) this.scroller.scrollTop = this.scroller.scrollHeight
    this.#draw()
  }

  #draw() {
    const { rows } = this.model
    const first = Math.max(0, Math.floor(this.scroller.scrollTop / HEIGHT) - SPARE)
    const last = Math.min(
      rows.length,
      Math.ceil((this.scroller.scrollTop + this.scroller.clientHeight) / HEIGHT) + SPARE,
    )
    // A view keeps its row while that is in sight, so that focus stays where it is.
    const free = this.views.filter((view) => view.index < first || view.index >= last)
    const shown = new Map(this.views.filter((view) => !free.includes(view)).map((view) => [view.index, view]))
    for (let index = first; index < last; index += 1) {
      const view = shown.get(index) ?? free.pop() ?? this.#made()
      view.update(index, rows[index], rows.length, this.turns, rows[index] === this.picked)
      view.button.tabIndex = index === this.focused ? 0 : -1
    }
    for (const view of free) {
      view.element.remove()
      this.views.splice(this.views.indexOf(view), 1)
    }
    if (this.focused < first || this.focused >= last) {
      const top = this.views.reduce((a, b) => (a === null || b.index < a.index ? b : a), null)
      if (top) top.button.tabIndex = 0
    }
    if (this.picked !== null) this.#detail()
  }

  #made() {
    const view = new RowView((index) => this.pick(index))
    this.views.push(view)
    this.list.append(view.element)
    return view
  }

  /** Show the raw events of a row; null closes them. */
  pick(index) {
    const row = index === null ? null : this.model.rows[index]
    this.picked = row === this.picked ? null : row
    if (index !== null) this.focused = index
    show(this.detail, this.picked !== null)
    this.detailed = 0
    if (this.picked !== null) this.#detail()
    this.update()
  }

  #detail() {
    const row = this.picked
    if (this.detailed === row.to) return
    this.detailed = row.to
    setText(this.detail.querySelector('h3'), `${row.title}, ${row.from === row.to ? 'offset' : 'offsets'} ${row.range}`)
    const about = [
      row.worker && `worker ${row.worker}`,
      row.attempt > 0 && `attempt ${row.attempt}`,
      row.turn && `turn ${row.turn}`,
      clockTime(row.time),
    ]
    setText(this.detail.querySelector('.about'), about.filter(Boolean).join(' · '))
    const shown =
      row.items.length === 1
        ? JSON.stringify(row.items[0], null, 2)
        : row.items.map((item) => JSON.stringify(item)).join('\n')
    setText(
      this.detail.querySelector('pre'),
      row.left > 0 ? `${shown}\n(${row.left} in the middle of the run are not kept by the page)` : shown,
    )
  }

  #scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller
    this.following = scrollHeight - scrollTop - clientHeight < NEAR
    if (this.model !== null) this.#draw()
  }

  #key(event) {
    const page = Math.max(1, Math.floor(this.scroller.clientHeight / HEIGHT) - 1)
    const step = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity }[event.key]
    if (step === undefined) return
    event.preventDefault()
    const at = this.views.find((view) => view.button === event.target)?.index ?? this.focused
    this.focused = Math.min(this.model.rows.length - 1, Math.max(0, at + step))
    const top = this.focused * HEIGHT
    if (top < this.scroller.scrollTop) this.scroller.scrollTop = top
    else if (top + HEIGHT > this.scroller.scrollTop + this.scroller.clientHeight)
      this.scroller.scrollTop = top + HEIGHT - this.scroller.clientHeight
    this.#draw()
    this.views.find((view) => view.index === this.focused)?.button.focus({ preventScroll: true })
  }
}
