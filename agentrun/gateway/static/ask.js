// A question of the agent, answered where it is asked.

import { h, setText, show } from './dom.js'
import { answerText, pretty } from './words.js'

let count = 0

export class QuestionView {
  /** @param {(value: any) => Promise<void>} answer sends the answer; what goes wrong is shown here */
  constructor(question, answer) {
    this.answer = answer
    const { event } = question
    const id = `question-${(count += 1)}`
    this.title = h('p', { class: 'prompt', id }, event.prompt || (event.tool ? `Run ${event.tool}` : 'The agent asks'))
    this.problem = h('p', { class: 'problem', role: 'alert', hidden: true })
    this.outcome = h('p', { class: 'outcome', hidden: true })
    this.controls = h('div', { class: 'controls' }, this.#controls(event))
    const about =
      event.kind === 'tool' && event.input !== undefined ? h('pre', { tabindex: '0' }, pretty(event.input)) : null
    this.element = h(
      'section',
      { class: 'question', role: 'group', 'aria-labelledby': id },
      this.title,
      about,
      this.controls,
      this.problem,
      this.outcome,
    )
  }

  #controls(event) {
    const button = (text, value, kind) =>
      h('button', { type: 'button', class: kind, on: { click: () => this.#send(value) } }, text)
    if (event.kind === 'approval') return [button('Approve', true, 'primary'), button('Deny', false, '')]
    if (event.kind === 'choice') return (event.choices ?? []).map((choice) => button(choice, choice, ''))
    const json = event.kind === 'tool'
    const input = h('textarea', {
      rows: json ? 3 : 1,
      'aria-label': json ? 'Result, as JSON' : 'Your answer',
      class: json ? 'mono' : '',
    })
    const submit = () => {
      try {
        this.#send(json ? JSON.parse(input.value) : input.value)
      } catch {
        this.#say('This is not JSON.')
      }
    }
    if (!json) {
      input.addEventListener('keydown', (key) => {
        if (key.key !== 'Enter' || key.shiftKey || key.isComposing) return
        key.preventDefault()
        submit()
      })
    }
    return [input, h('button', { type: 'button', class: 'primary', on: { click: submit } }, 'Answer')]
  }

  async #send(value) {
    this.#enable(false)
    this.#say('')
    try {
      await this.answer(value)
    } catch (problem) {
      this.#say(problem.message)
      this.#enable(true)
    }
  }

  #enable(enabled) {
    for (const control of this.controls.children) control.disabled = !enabled
  }

  #say(text) {
    setText(this.problem, text)
    show(this.problem, text !== '')
  }

  update(question, ended) {
    const open = question.answer === null && !ended
    if (open && this.open === false) this.#enable(true)
    this.open = open
    if (!open && this.controls.contains(document.activeElement))
      this.element.closest('.turn')?.focus({ preventScroll: true })
    show(this.controls, open)
    show(this.outcome, !open)
    this.element.dataset.open = String(open)
    const { answer } = question
    setText(
      this.outcome,
      answer === null ? 'Not answered' : `${answerText(answer.value)}${answer.user ? ` by ${answer.user}` : ''}`,
    )
    if (!open) this.#say('')
  }
}
