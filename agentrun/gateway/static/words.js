// Values, times and states in words.

/** Text, or JSON, cut to a line. */
export function short(value, width = 160) {
  const text = (typeof value === 'string' ? value : (JSON.stringify(value) ?? '')).replaceAll(/\s*\n\s*/g, ' ⏎ ')
  return text.length <= width ? text : `${text.slice(0, width - 1)}…`
}

/** JSON for reading; a string stays what it is. */
export function pretty(value) {
  return typeof value === 'string' ? value : JSON.stringify(value, null, 2)
}

const minutes = { hour: '2-digit', minute: '2-digit', hour12: false }
const CLOCKS = {
  minutes: new Intl.DateTimeFormat(undefined, minutes),
  tenths: new Intl.DateTimeFormat(undefined, { ...minutes, second: '2-digit', fractionalSecondDigits: 1 }),
}

export function clockTime(seconds, exact = 'tenths') {
  return seconds ? CLOCKS[exact].format(seconds * 1000) : ''
}

export function span(seconds) {
  if (seconds < 0.0995) return `${Math.round(seconds * 1000)}\u00a0ms`
  if (seconds < 59.95) return `${seconds.toFixed(1)}\u00a0s`
  return `${Math.floor(seconds / 60)}\u00a0min ${Math.floor(seconds % 60)}\u00a0s`
}

export function ago(seconds) {
  const passed = Date.now() / 1000 - seconds
  if (passed < 60) return 'now'
  if (passed < 3600) return `${Math.floor(passed / 60)} min`
  if (passed < 86400) return `${Math.floor(passed / 3600)} h`
  return `${Math.floor(passed / 86400)} d`
}

/** How a turn stands: `[words, tone]`. */
export function standing(view) {
  switch (view.state) {
    case 'queued':
      return [view.attempt > 0 ? 'Handed over, waits for a worker' : 'Waits for its turn', 'wait']
    case 'running':
      if (view.stop !== null || view.interrupted_by !== null) return ['Stopping', 'run']
      return view.asks ? ['Waits for your answer', 'ask'] : ['Answering', 'run']
    case 'suspended':
      return ['Waits for an answer', 'ask']
    case 'retrying':
      return [`Failed, will be tried again: ${view.error?.message ?? ''}`, 'warn']
    case 'completed':
      return ['Completed', 'done']
    case 'cancelled':
      return [`Stopped${stoppedBy(view)}${view.rolled_back ? ', taken back' : ''}`, 'stop']
    case 'failed':
      return [`Failed: ${view.error?.message ?? ''}`, 'stop']
    case 'expired':
      return [`Expired${view.reason ? `: ${view.reason}` : ''}`, 'stop']
    case 'consumed':
      return ['Taken in by the running answer', 'done']
    default:
      return [`Rejected${view.reason ? `: ${view.reason}` : ''}`, 'stop']
  }
}

function stoppedBy(view) {
  if (view.by !== null && view.by === view.interrupted_by) return ' by a later message'
  return `${view.by ? ` by ${view.by}` : ''}${view.reason ? ` (${view.reason})` : ''}`
}

/** An answer to a question, in words. */
export function answerText(value) {
  if (typeof value === 'boolean') return value ? 'Approved' : 'Denied'
  if (typeof value?.approved === 'boolean')
    return `${value.approved ? 'Approved' : 'Denied'}${value.reason ? `: ${value.reason}` : ''}`
  return short(value)
}
