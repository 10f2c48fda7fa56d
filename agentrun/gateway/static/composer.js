// Writing, sending and stopping.

import { setText, show } from './dom.js'
import { store } from './store.js'

const BUSY = ['enqueue', 'interrupt', 'steer']

export class Composer {
  /** @param actions `send({text, on_busy, agent, device})`, `stop()` */
  constructor(form, actions) {
    this.form = form
    this.actions = actions
    this.message = form.querySelector('#message')
    this.sendButton = form.querySelector('#send')
    this.stopButton = form.querySelector('#stop')
    this.choice = form.querySelector('#busy')
    this.note = form.querySelector('#note')
    this.agent = form.querySelector('#agent')
    this.device = form.elements.namedItem('device')
    form.addEventListener('submit', (event) => {
      event.preventDefault()
      this.#send()
    })
    this.message.addEventListener('keydown', (event) => {
      if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return
      event.preventDefault()
      this.#send()
    })
    this.message.addEventListener('input', () => this.#typed())
    this.stopButton.addEventListener('click', () => this.actions.stop())
    document.addEventListener('keydown', (event) => {
      if (event.key !== '.' || !(event.ctrlKey || event.metaKey) || this.stopButton.hidden) return
      event.preventDefault()
      this.actions.stop()
    })
    for (const input of [this.agent, this.device]) {
      input.addEventListener('change', () => store.set(input.id, input.value.trim() || null))
    }
    this.#typed()
  }

  /** Start over for another session: what was typed for it is there again. */
  open(session) {
    this.session = session
    this.message.value = store.get(`draft.${session}`, '')
    this.say('')
    this.#typed()
  }

  /** Whether something is being answered. */
  busy(busy, stopping) {
    show(this.choice, busy)
    show(this.stopButton, busy)
    setText(this.stopButton.querySelector('.label'), stopping ? 'Stop again' : 'Stop')
  }

  say(text, tone = '') {
    setText(this.note, text)
    this.note.dataset.tone = tone
  }

  #typed() {
    const { message } = this
    this.sendButton.disabled = message.value.trim() === ''
    if (this.session) store.set(`draft.${this.session}`, message.value || null)
    if (!CSS.supports('field-sizing', 'content')) {
      message.style.height = 'auto'
      message.style.height = `${Math.min(message.scrollHeight, 200)}px`
    }
  }

  #send() {
    const text = this.message.value.trim()
    if (text === '') return
    const chosen = this.form.querySelector('input[name=on_busy]:checked')?.value
    this.actions.send({
      text,
      on_busy: this.choice.hidden || !BUSY.includes(chosen) ? 'enqueue' : chosen,
      agent: this.agent.value.trim() || null,
      device: this.device.value.trim() || null,
    })
    this.message.value = ''
    this.say('')
    this.#typed()
    this.message.focus()
  }
}
