// The panes at the sides: columns where there is room for them, else sheets over the conversation.

import { store } from './store.js'

const $ = (id) => document.getElementById(id)

/** Set them up; gives `closeSheets()`, which leaves columns alone. */
export function setUpPanels({ onTimeline }) {
  const narrow = { sessions: matchMedia('(max-width: 860px)'), timeline: matchMedia('(max-width: 1180px)') }
  const panels = { sessions: $('sessions'), timeline: $('timeline') }
  const openers = { sessions: $('open-sessions'), timeline: $('open-timeline') }
  const main = document.querySelector('main')
  const open = { sessions: !narrow.sessions.matches, timeline: !narrow.timeline.matches && store.get('timeline', true) }

  function draw() {
    for (const name of Object.keys(panels)) {
      panels[name].hidden = !open[name]
      panels[name].classList.toggle('sheet', narrow[name].matches)
      openers[name].setAttribute('aria-expanded', String(open[name]))
    }
    // What a sheet covers is out of reach.
    const covered = Object.keys(panels).find((name) => open[name] && narrow[name].matches)
    main.inert = covered !== undefined
    for (const name of Object.keys(panels)) panels[name].inert = covered !== undefined && covered !== name
    document.body.classList.toggle('covered', covered !== undefined)
    if (open.timeline) onTimeline()
  }

  function set(name, value, { asked = true } = {}) {
    open[name] = value
    if (asked && name === 'timeline' && !narrow.timeline.matches) store.set('timeline', value)
    draw()
    if (!asked || !narrow[name].matches) return
    if (value) panels[name].querySelector('[data-close]').focus()
    else openers[name].focus()
  }

  for (const name of Object.keys(panels)) {
    openers[name].addEventListener('click', () => set(name, !open[name]))
    panels[name].querySelector('[data-close]').addEventListener('click', () => set(name, false))
    narrow[name].addEventListener('change', () => {
      const wanted = name === 'sessions' || store.get('timeline', true)
      set(name, wanted && !narrow[name].matches, { asked: false })
    })
  }
  const closeSheets = () => {
    for (const name of Object.keys(panels)) if (open[name] && narrow[name].matches) set(name, false)
  }
  document.addEventListener(
    'keydown',
    (event) => event.key === 'Escape' && !document.querySelector('dialog[open]') && closeSheets(),
  )
  document.addEventListener('click', (event) => event.target === document.body && closeSheets())
  draw()
  return { closeSheets }
}
