// The page: one session at a time, and what is around it.

import { Api, newId } from './api.js'
import { Chat } from './chat.js'
import { Composer } from './composer.js'
import { batched, h, setText, show } from './dom.js'
import { Follower } from './follow.js'
import { textOf } from './message.js'
import { Outbox } from './outbox.js'
import { setUpPanels } from './panels.js'
import { Timeline } from './rows.js'
import { Session } from './session.js'
import { SessionList, titleOf } from './sessions.js'
import { defaultDevice, store } from './store.js'
import { TimelineView } from './timeline.js'
import { short, standing } from './words.js'

const $ = (id) => document.getElementById(id)
const REFRESH = 20_000
const READ_OUT = 600
const IDEAS = ['count 60 50', 'approve 20 50', 'steer 60 100']

const CONNECTION = {
  loading: 'Connecting …',
  live: 'Live',
  polling: 'Live, by long-polling',
  reconnecting: 'Reconnecting …',
  broker: 'Broker away, waiting for it …',
  offline: 'Offline, will go on from here',
  paused: 'Paused while hidden',
  token: 'A token is needed',
  refused: 'Refused',
}

class App {
  constructor() {
    this.api = new Api(() => store.token)
    this.outbox = new Outbox(this.api, () => this.#changed())
    this.chat = new Chat($('conversation'), $('latest'), {
      answer: (turn, request, value) => this.api.answer(this.id, turn, request, value),
      resend: (id) => this.outbox.again(id),
      discard: (id) => this.outbox.remove(id),
    })
    this.timeline = new TimelineView({
      scroller: $('rows'),
      list: $('rows').querySelector('ol'),
      detail: $('detail'),
      empty: $('no-rows'),
    })
    this.panels = setUpPanels({ onTimeline: () => this.timeline.update() })
    this.composer = new Composer($('composer'), { send: (message) => this.#send(message), stop: () => this.#stop() })
    this.list = new SessionList($('session-list'), this.api, (id) => this.open(id))
    this.render = batched(() => this.#draw())
    this.dirty = new Set()
  }

  async start() {
    this.#takeToken()
    $('new').addEventListener('click', () => this.open(newId('s')))
    $('theme').addEventListener('change', () => setTheme($('theme').value))
    $('theme').value = store.get('theme', 'system')
    addEventListener('popstate', () => this.#openFromAddress())
    this.#dialogs()
    this.#openFromAddress()
    this.outbox.run()
    const config = await this.api.config().catch(() => ({}))
    this.#configure(config)
    await this.list.refresh()
    setInterval(() => document.hidden || this.list.refresh(), REFRESH)
  }

  // A token comes in the fragment, which browsers send to nobody, and does not stay in the address.
  #takeToken() {
    const token = new URLSearchParams(location.hash.slice(1)).get('token')
    if (token === null) return
    store.token = token
    history.replaceState(null, '', location.pathname + location.search)
  }

  #configure({ agent = null, agents = [], token = false }) {
    this.needsToken = token
    $('agents').replaceChildren(...agents.map((name) => h('option', { value: name })))
    $('agent').value = store.get('agent') ?? agent ?? agents[0] ?? ''
    $('device').value = store.get('device') ?? defaultDevice()
    const echoes = agent === 'echo' || agents.includes('echo')
    show($('ideas'), echoes)
    if (!echoes) return
    const idea = (text) => h('button', { type: 'button', class: 'small', on: { click: () => this.#try(text) } }, text)
    $('ideas').replaceChildren(h('p', {}, 'The agent echo has some tricks:'), ...IDEAS.map(idea))
  }

  #try(text) {
    this.composer.message.value = text
    this.composer.message.dispatchEvent(new Event('input'))
    this.composer.message.focus()
  }

  #openFromAddress() {
    const id = new URLSearchParams(location.search).get('session')
    if (id && /^[\w-]{1,128}$/.test(id)) this.#open(id)
    else this.open(newId('s'), { replace: true })
  }

  /** Show a session; its id is in the address, so that a reload shows it again. */
  open(id, { replace = false } = {}) {
    const address = `?session=${encodeURIComponent(id)}`
    if (replace) history.replaceState(null, '', address)
    else if (id !== this.id) history.pushState(null, '', address)
    this.#open(id)
  }

  #open(id) {
    this.panels.closeSheets()
    if (id === this.id) return
    this.follower?.stop()
    this.id = id
    this.#reset()
    this.composer.open(id)
    this.list.current = id
    this.list.draw()
    this.follower = new Follower({
      api: this.api,
      session: id,
      onItems: (items) => this.#items(items),
      onState: (state) => this.#connection(state),
      onReset: () => this.#reset(),
    })
    this.#connection({ kind: 'loading' })
    this.follower.start()
  }

  #reset() {
    this.session = new Session()
    this.rows = new Timeline()
    this.title = null
    this.chat.reset()
    this.timeline.reset(this.rows)
    this.#changed()
  }

  #items(items) {
    const live = this.follower.state !== 'loading'
    for (const item of items) {
      this.rows.add(item)
      for (const view of this.session.apply(item)) this.dirty.add(view)
      if (item.event?.type === 'turn.requested') this.#requested(item)
      if (live) this.#announce(item.event)
    }
    this.render()
  }

  #requested({ event, time }) {
    this.outbox.remove(event.turn)
    if (this.title === null && typeof event.agent === 'string') this.title = titleOf(event)
    if (this.title !== null) store.remember(this.id, this.title, time)
    this.list.draw()
  }

  // Tokens are not read out one by one: an answer is, when it has ended.
  #announce(event) {
    const view = this.session.turns.get(event?.turn)
    if (!view) return
    let words = ''
    if (event.type === 'input.required') words = `Question: ${event.prompt || event.kind}`
    else if (view.ended && view.ended_at === this.session.offset)
      words = `${standing(view)[0]}. ${short(textOf(view.parts), READ_OUT)}`
    if (words === '') return
    const region = $('announcer')
    region.append(h('p', {}, words))
    while (region.childElementCount > 3) region.firstElementChild.remove()
  }

  #changed() {
    this.render?.()
  }

  #draw() {
    const { session } = this
    const turns = [...this.dirty]
      .filter((view) => session.turns.get(view.id) === view)
      .sort((a, b) => a.offset - b.offset)
    this.dirty.clear()
    this.chat.update(turns, this.outbox.of(this.id))
    this.timeline.update()
    const { active } = session
    this.composer.busy(active !== null, active?.stop !== null && active !== null)
    setText($('title'), this.title ?? 'New session')
    setText($('summary'), session.offset > 0 ? `offsets 1–${session.offset}, ${this.rows.rows.length} rows` : '')
    document.title = `${active ? '● ' : ''}${this.title ?? 'New session'} – agentrun`
  }

  #connection({ kind, detail = '' }) {
    const element = $('connection')
    element.dataset.kind = kind
    element.title = detail
    const words = kind === 'refused' && detail ? `${CONNECTION[kind]}: ${detail}` : CONNECTION[kind]
    setText(element.querySelector('.words'), words)
    show($('enter-token'), kind === 'token' || kind === 'refused')
    if (kind === 'token') this.#askToken(detail)
    if (kind === 'live') this.outbox.run()
  }

  #send({ text, on_busy, agent, device }) {
    const body = { id: newId('t', 16), input: text, on_busy, device }
    if (agent !== null) body.agent = agent
    this.chat.following = true
    this.outbox.add(this.id, body)
  }

  async #stop() {
    const { active } = this.session
    if (active === null) return
    this.composer.say('Stopping …')
    const device = $('device').value.trim()
    try {
      const receipt = await this.api.cancel(this.id, active.id, device ? `from ${device}` : null)
      const words = {
        cancelled: 'Stopped',
        already_ended: 'It had already ended',
        not_found: 'No such turn',
        pending: 'The stop is stored, and not obeyed yet',
      }
      const at = receipt.offset > 0 ? ` at offset ${receipt.offset}` : ''
      this.composer.say(
        `${words[receipt.status] ?? receipt.status}${at}, ${(receipt.took * 1000).toFixed(1)} ms`,
        receipt.status === 'pending' ? 'warn' : 'done',
      )
    } catch (problem) {
      this.composer.say(`Not stopped: ${problem.message}`, 'warn')
    }
  }

  // ------------------------------------------------------------------------------------------------------ dialogs

  #dialogs() {
    for (const button of document.querySelectorAll('[data-dismiss]'))
      button.addEventListener('click', () => button.closest('dialog').close())
    $('share').addEventListener('click', () => this.#share())
    $('share-copy').addEventListener('click', () => this.#copy())
    $('token-form').addEventListener('submit', (event) => {
      event.preventDefault()
      store.token = $('token').value.trim()
      $('token').value = ''
      $('token-dialog').close()
      this.follower.check()
      this.outbox.run()
      this.list.refresh()
    })
    $('enter-token').addEventListener('click', () => this.#askToken(''))
  }

  #askToken(why) {
    setText($('token-why'), why || 'This gateway wants to know who you are.')
    if (!$('token-dialog').open) $('token-dialog').showModal()
  }

  #share() {
    const link = new URL(`?session=${encodeURIComponent(this.id)}`, location.href)
    if (store.token) link.hash = `token=${encodeURIComponent(store.token)}`
    $('share-link').value = link.href
    $('share-open').href = link.href
    setText($('share-copy'), 'Copy the link')
    const local = ['localhost', '127.0.0.1', '[::1]'].includes(location.hostname)
    const notes = [
      store.token
        ? 'The link holds your token: whoever has the link may do what you may. It stands behind the #, which browsers do not send to servers.'
        : '',
      local
        ? 'This address is good on this machine: for another tab or browser. Another device needs an address it can reach, and tokens: agentrun gateway.'
        : '',
    ]
    setText($('share-note'), notes.filter(Boolean).join(' '))
    $('share-dialog').showModal()
    $('share-link').select()
  }

  async #copy() {
    try {
      await navigator.clipboard.writeText($('share-link').value)
    } catch {
      // No clipboard without https: the old way.
      $('share-link').select()
      document.execCommand('copy')
    }
    setText($('share-copy'), 'Copied')
  }
}

function setTheme(theme) {
  store.set('theme', theme === 'system' ? null : theme)
  if (theme === 'system') delete document.documentElement.dataset.theme
  else document.documentElement.dataset.theme = theme
}

const app = new App()
app.start()
