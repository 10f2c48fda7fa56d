// The conversation: an article for each turn, updated in place.

import { QuestionView } from './ask.js'
import { h, setText, show } from './dom.js'
import { inputText } from './message.js'
import { PartsView } from './parts.js'
import { clockTime, span, standing } from './words.js'

const NEAR = 80

class TurnArticle {
  constructor(view, actions) {
    this.actions = actions
    this.questions = new Map()
    this.heading = h('h3', { class: 'vh' }, 'Message')
    this.bubble = h('div', { class: 'bubble', dir: 'auto' })
    this.from = h('p', { class: 'from' })
    this.parts = new PartsView()
    this.notices = h('ul', { class: 'notices', hidden: true })
    this.state = h('span', { class: 'state' })
    this.facts = h('span', { class: 'facts' })
    this.answer = h(
      'div',
      { class: 'answer', dir: 'auto' },
      h('h4', { class: 'vh' }, 'Answer'),
      this.parts.element,
      this.notices,
      h('p', { class: 'foot' }, this.state, this.facts),
    )
    this.element = h(
      'article',
      { class: 'turn', 'data-turn': view.id, tabindex: '-1' },
      this.heading,
      h('div', { class: 'said' }, this.bubble, this.from),
      this.answer,
    )
  }

  update(view) {
    this.#request(view)
    const running = view.state === 'running' && !view.asks
    this.element.dataset.state = view.state
    this.element.classList.toggle('gone', view.rolled_back || view.replaced_by !== null)
    this.answer.setAttribute('aria-busy', String(running))
    this.parts.element.classList.toggle('outdated', view.outdated)
    this.parts.update(view, view.state !== 'running')
    this.#ask(view)
    this.#foot(view)
  }

  #request(view) {
    if (this.request === view.request && this.requested) return
    this.requested = true
    this.request = view.request
    const from = view.request?.user ?? view.request?.device ?? ''
    setText(this.heading, from ? `Message from ${from}` : 'Message')
    setText(this.bubble, view.request === null ? '(the message has expired)' : inputText(view.request.input))
    setText(
      this.from,
      [from, view.agent && `to ${view.agent}`, clockTime(view.times.sent, 'minutes')].filter(Boolean).join(' · '),
    )
  }

  #ask(view) {
    for (const [request, question] of view.questions) {
      let shown = this.questions.get(request)
      if (!shown) {
        shown = new QuestionView(question, (value) => this.actions.answer(view.id, request, value))
        this.questions.set(request, shown)
      }
      shown.update(question, view.ended)
    }
    // Each stands where it was asked: behind the parts there were then.
    let next = null
    for (const [request, question] of [...view.questions].reverse()) {
      const { element } = this.questions.get(request)
      const before =
        next !== null && next.after === question.after
          ? next.element
          : (this.parts.views[question.after]?.element ?? null)
      if (element.parentElement === null || element.nextElementSibling !== before)
        this.parts.element.insertBefore(element, before)
      next = { element, after: question.after }
    }
  }

  #foot(view) {
    const [words, tone] = standing(view)
    setText(this.state, words)
    this.state.dataset.tone = tone
    const { started, ended, sent } = view.times
    const tokens = view.usage?.output_tokens || view.tokens
    const facts = [
      view.worker && `worker ${view.worker}`,
      view.attempt > 1 && `attempt ${view.attempt}`,
      tokens > 0 &&
        `${tokens} token${tokens === 1 ? '' : 's'}${view.attempt > 1 && !view.usage?.output_tokens ? ' in it' : ''}`,
      ended && (started ?? sent) && view.state !== 'consumed' && span(ended - (started ?? sent)),
      view.replaced_by !== null && 'replaced by a later message',
      view.incomplete && 'a part of this is lost',
    ]
    setText(
      this.facts,
      facts
        .filter(Boolean)
        .map((fact) => ` · ${fact}`)
        .join(''),
    )
    show(this.notices, view.notices.length > 0)
    for (let at = this.notices.childElementCount; at < view.notices.length; at += 1)
      this.notices.append(h('li', {}, view.notices[at]))
  }
}

class SendingArticle {
  constructor(entry, actions) {
    this.state = h('span', { class: 'state', 'data-tone': 'wait' })
    this.again = h(
      'button',
      { type: 'button', class: 'small', on: { click: () => actions.resend(entry.body.id) } },
      'Try again',
    )
    this.discard = h(
      'button',
      { type: 'button', class: 'small', on: { click: () => actions.discard(entry.body.id) } },
      'Discard',
    )
    this.element = h(
      'article',
      { class: 'turn sending' },
      h('h3', { class: 'vh' }, 'Your message, not sent yet'),
      h(
        'div',
        { class: 'said' },
        h('div', { class: 'bubble', dir: 'auto' }, inputText(entry.body.input)),
        h('p', { class: 'from' }, this.state, this.again, this.discard),
      ),
    )
  }

  update(entry) {
    setText(
      this.state,
      entry.problem ? (entry.failed ? `Not sent: ${entry.problem}` : `Not sent yet: ${entry.problem}`) : 'Sending …',
    )
    this.state.dataset.tone = entry.failed ? 'stop' : 'wait'
    show(this.again, entry.failed)
    show(this.discard, entry.failed)
  }
}

export class Chat {
  /** @param actions what the articles' buttons do: answer, resend, discard */
  constructor(scroller, latest, actions) {
    this.scroller = scroller
    this.list = scroller.querySelector('#turns')
    this.empty = scroller.querySelector('#empty')
    this.latest = latest
    this.actions = actions
    this.articles = new Map()
    this.sending = new Map()
    this.following = true
    scroller.addEventListener('scroll', () => this.#scrolled(), { passive: true })
    latest.addEventListener('click', () => this.toEnd())
    new ResizeObserver(() => this.following && this.toEnd()).observe(scroller)
  }

  reset() {
    for (const shown of [...this.articles.values(), ...this.sending.values()]) shown.element.remove()
    this.articles.clear()
    this.sending.clear()
    this.following = true
  }

  /** Show these turns as they stand, and the messages on their way behind them. */
  update(turns, outbox) {
    for (const view of turns) {
      let article = this.articles.get(view.id)
      if (!article) {
        article = new TurnArticle(view, this.actions)
        this.articles.set(view.id, article)
        this.list.append(article.element)
      }
      article.update(view)
    }
    this.#outbox(outbox)
    show(this.empty, this.articles.size + this.sending.size === 0)
    if (this.following) this.scroller.scrollTop = this.scroller.scrollHeight
    show(this.latest, !this.following)
  }

  #outbox(outbox) {
    const left = new Set(this.sending.keys())
    for (const entry of outbox) {
      const { id } = entry.body
      if (this.articles.has(id)) continue
      left.delete(id)
      let shown = this.sending.get(id)
      if (!shown) {
        shown = new SendingArticle(entry, this.actions)
        this.sending.set(id, shown)
      }
      if (this.list.lastElementChild !== shown.element) this.list.append(shown.element)
      shown.update(entry)
    }
    for (const id of left) {
      this.sending.get(id).element.remove()
      this.sending.delete(id)
    }
  }

  toEnd() {
    this.following = true
    this.scroller.scrollTop = this.scroller.scrollHeight
    show(this.latest, false)
  }

  #scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller
    this.following = scrollHeight - scrollTop - clientHeight < NEAR
    show(this.latest, !this.following)
  }
}
