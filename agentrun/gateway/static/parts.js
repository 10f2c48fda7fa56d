// The parts of a message: text, reasoning, tool calls, data, sources, files.

import { h, icon, setText, show } from './dom.js'
import { TextView } from './text.js'
import { pretty, short } from './words.js'

const TOOL = 'M14.7 6.3a4 4 0 0 0-5.2 5.2L4 17l3 3 5.5-5.5a4 4 0 0 0 5.2-5.2L15 12l-3-3z'
const has = (object, key) => Object.hasOwn(object, key)

class TextPart {
  constructor() {
    this.text = new TextView()
    this.element = this.text.element
  }

  update(part, done, grown) {
    if (grown && !done) this.text.grow(part.text)
    else this.text.update(part.text, done)
  }
}

class ReasoningPart {
  constructor() {
    this.text = new TextView('reasoning')
    this.summary = h('summary', {}, 'Reasoning')
    this.element = h('details', { class: 'card' }, this.summary, this.text.element)
  }

  update(part, done) {
    setText(this.summary, done ? 'Reasoning' : 'Reasoning …')
    this.text.update(part.text, done)
  }
}

class ToolPart {
  constructor() {
    this.name = h('span', { class: 'name' })
    this.brief = h('span', { class: 'brief' })
    this.state = h('span', { class: 'tool-state' })
    this.input = h('pre', { tabindex: '0' })
    this.outputTitle = h('h4', {})
    this.output = h('pre', { tabindex: '0' })
    this.element = h(
      'details',
      { class: 'card tool' },
      h('summary', {}, icon(TOOL), this.name, this.brief, this.state),
      h('h4', {}, 'Input'),
      this.input,
      this.outputTitle,
      this.output,
    )
  }

  update(part, done) {
    const failed = (part.error ?? null) !== null
    const settled = failed || has(part, 'output')
    const input = has(part, 'input') ? part.input : (part.input_text ?? '')
    const key = [part.name, has(part, 'input'), part.input_text?.length, settled, done].join()
    if (key === this.key) return
    this.key = key
    setText(this.name, part.name || part.call)
    setText(this.brief, short(input, 80))
    const waiting = !has(part, 'input') ? 'being written' : done ? 'no result' : 'called'
    setText(this.state, failed ? 'failed' : settled ? 'done' : waiting)
    this.state.dataset.tone = failed ? 'stop' : settled ? 'done' : 'wait'
    setText(this.input, pretty(input))
    setText(this.outputTitle, failed ? 'Error' : 'Output')
    setText(this.output, settled ? pretty(failed ? part.error : part.output) : '')
    show(this.outputTitle, settled)
    show(this.output, settled)
  }
}

class DataPart {
  constructor() {
    this.title = h('summary', {})
    this.data = h('pre', { tabindex: '0' })
    this.element = h('details', { class: 'card' }, this.title, this.data)
  }

  update(part) {
    if (part === this.part) return
    this.part = part
    setText(this.title, `Data: ${part.name}`)
    setText(this.data, pretty(part.data))
  }
}

class LinkPart {
  constructor() {
    this.element = h('p', { class: 'link' })
  }

  update(part) {
    if (part === this.part) return
    this.part = part
    const text = part.title ?? part.name ?? part.url
    const kind = part.type === 'source' ? 'Source: ' : 'File: '
    // Only what a browser can safely be sent to; a javascript: address stays text.
    const link = /^https?:\/\//i.test(part.url)
      ? h('a', { href: part.url, target: '_blank', rel: 'noopener noreferrer nofollow' }, text)
      : text
    this.element.replaceChildren(kind, link)
  }
}

const VIEWS = {
  text: TextPart,
  reasoning: ReasoningPart,
  tool: ToolPart,
  data: DataPart,
  source: LinkPart,
  file: LinkPart,
}

export class PartsView {
  constructor() {
    this.element = h('div', { class: 'parts' })
    this.views = []
    this.generation = ''
  }

  /** Show a turn's message. `done`: nothing is being added to it. */
  update(turn, done) {
    const { parts } = turn
    const grown = turn.generation === this.generation
    this.generation = turn.generation
    while (this.views.length > parts.length) this.views.pop().element.remove()
    parts.forEach((part, index) => {
      let view = this.views[index]
      if (view?.type !== part.type) {
        const kind = Object.hasOwn(VIEWS, part.type) ? VIEWS[part.type] : DataPart
        const made = new kind()
        made.type = part.type
        if (view) view.element.replaceWith(made.element)
        else this.element.append(made.element)
        this.views[index] = view = made
      }
      view.update(part, done || index < parts.length - 1, grown)
    })
  }
}
