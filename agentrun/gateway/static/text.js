// Text that streams, with code blocks and a little markup. The markup's own characters are hidden, not removed: an
// element's textContent is the text as it was sent, character by character.

import { h } from './dom.js'

const BLOCK = 4000
const MARKUP = /(`+)([^`\n]+)\1|\*\*([^*\n]+)\*\*/g
const HEADING = /^#{1,6} +/

export class TextView {
  constructor(kind = 'text') {
    this.element = h('div', { class: kind })
    this.raw = ''
    this.#begin()
  }

  #block
  #line
  #lineStart
  #held
  #fence
  #finished

  /** Show `text`. What was shown and is the beginning of it stays as it is. */
  update(text, done) {
    if (text.length === this.raw.length && done === this.#finished && text === this.raw) return
    if (this.#finished || !text.startsWith(this.raw)) this.#begin()
    this.grow(text)
    if (done) this.#finish()
  }

  /** Show `text`, which begins with what is shown. */
  grow(text) {
    if (this.#finished) return this.update(text, false)
    const lines = text.slice(this.raw.length).split('\n')
    this.raw = text
    lines.forEach((line, index) => {
      if (index > 0) this.#newline()
      this.#write(line)
    })
  }

  #begin() {
    this.element.replaceChildren()
    this.raw = ''
    this.#block = this.#line = null
    this.#lineStart = 0
    this.#held = ''
    this.#fence = null
    this.#finished = false
  }

  #write(text) {
    if (text === '') return
    const starts = this.#line === null || this.#lineStart === this.#line.length
    if (starts) {
      // The beginning of a line is held back while it may become a fence.
      text = this.#held + text
      this.#held = ''
      if (this.#mayBeFence(text)) {
        this.#held = text
        return
      }
    }
    this.#put(text)
  }

  #put(text) {
    this.#block ??= this.element.appendChild(h('div', { class: 'block' }))
    if (this.#line === null) {
      this.#line = this.#block.appendChild(document.createTextNode(''))
      this.#lineStart = 0
    }
    this.#line.appendData(text)
  }

  #newline() {
    if (this.#held !== '') {
      const held = this.#held
      this.#held = ''
      if (this.#isFence(held)) return this.#toggle(`${held}\n`)
      this.#put(held)
    }
    this.#format()
    this.#put('\n')
    this.#lineStart = this.#line.length
    if (this.#fence === null && this.#line.length > BLOCK) this.#block = this.#line = null
  }

  #finish() {
    const held = this.#held
    this.#held = ''
    if (held !== '') {
      if (this.#fence !== null && this.#isFence(held)) this.#toggle(held)
      else this.#put(held)
    }
    this.#format()
    this.#finished = true
  }

  #mayBeFence(line) {
    return this.#fence === null ? /^ {0,3}(`{0,2}|`{3,}[^`]*)$/.test(line) : /^ {0,3}`*\s*$/.test(line)
  }

  #isFence(line) {
    const marks = line.trim().match(/^`{3,}/)?.[0].length ?? 0
    return this.#fence === null ? marks > 0 : marks >= this.#fence && /^ {0,3}`+\s*$/.test(line)
  }

  #toggle(line) {
    const mark = h('span', { class: 'mark', hidden: true }, line)
    this.#line = null
    if (this.#fence === null) {
      this.#fence = line.trim().match(/^`+/)[0].length
      const language = line.trim().slice(this.#fence).trim()
      this.#block = h('code', {})
      this.element.append(mark, h('pre', { 'data-language': language || null, tabindex: '0' }, this.#block))
    } else {
      this.#fence = this.#block = null
      this.element.append(mark)
    }
  }

  /** Dress up the line that has ended. */
  #format() {
    if (this.#fence !== null || this.#line === null) return
    const line = this.#line.data.slice(this.#lineStart)
    if (!line.includes('`') && !line.includes('**') && !line.startsWith('#')) return
    const nodes = dressed(line)
    if (nodes === null) return
    this.#line.deleteData(this.#lineStart, line.length)
    this.#block.append(...nodes)
    this.#line = null
  }
}

const mark = (text) => h('span', { class: 'mark', hidden: true }, text)

function dressed(line) {
  const nodes = []
  let at = 0
  const heading = line.match(HEADING)?.[0] ?? ''
  if (heading) {
    nodes.push(mark(heading))
    at = heading.length
  }
  for (const match of line.matchAll(MARKUP)) {
    if (match.index < at) continue
    if (match.index > at) nodes.push(document.createTextNode(line.slice(at, match.index)))
    if (match[3] !== undefined) nodes.push(mark('**'), h('strong', {}, match[3]), mark('**'))
    else nodes.push(mark(match[1]), h('code', {}, match[2]), mark(match[1]))
    at = match.index + match[0].length
  }
  if (at === 0) return null
  if (at < line.length) nodes.push(document.createTextNode(line.slice(at)))
  return heading ? [nodes[0], h('strong', { class: 'heading' }, nodes.slice(1))] : nodes
}
