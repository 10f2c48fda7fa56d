// Making elements. Text is only ever set as text: nothing here, or anywhere in the page, parses HTML.

/**
 * Make an element.
 *
 * `props`: `class`, `on` (listeners by event), `hidden` and the like as attributes; null, undefined and false are
 * left out, true is an empty attribute. Children are nodes or text; null and false are left out.
 */
export function h(tag, props, ...children) {
  const element = document.createElement(tag)
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === null || value === undefined || value === false) continue
    if (name === 'on') for (const [type, listener] of Object.entries(value)) element.addEventListener(type, listener)
    else element.setAttribute(name, value === true ? '' : String(value))
  }
  for (const child of children.flat())
    if (child !== null && child !== undefined && child !== false) element.append(child)
  return element
}

const SVG = 'http://www.w3.org/2000/svg'

/** A line icon from its path; it says nothing to screen readers. */
export function icon(path) {
  const svg = document.createElementNS(SVG, 'svg')
  for (const [name, value] of [
    ['viewBox', '0 0 24 24'],
    ['aria-hidden', 'true'],
    ['class', 'icon'],
  ])
    svg.setAttribute(name, value)
  const line = document.createElementNS(SVG, 'path')
  line.setAttribute('d', path)
  svg.append(line)
  return svg
}

/** Set an element's text only if it differs, so that nothing is laid out or read out for nothing. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text
}

export function show(element, visible) {
  if (element.hidden === visible) element.hidden = !visible
}

/** Run `work` once before the next frame, however often it is asked for; in a hidden tab soon. */
export function batched(work) {
  let frame = 0
  let timer = 0
  const run = () => {
    cancelAnimationFrame(frame)
    clearTimeout(timer)
    frame = timer = 0
    work()
  }
  return () => {
    if (timer !== 0) return
    frame = requestAnimationFrame(run)
    timer = setTimeout(run, 250)
  }
}
