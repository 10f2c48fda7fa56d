// durable.mjs URL LIVE OFFSET TURNS [TOKEN]: read a session with @durable-streams/client.
// LIVE false: all there is, printed at once. Else: a line for each batch, until so many turns have ended.
import { stream } from '@durable-streams/client'

const [url, mode, offset, turns, token] = process.argv.slice(2)
const live = { false: false, true: true }[mode] ?? mode
const headers = token ? { Authorization: `Bearer ${token}` } : {}
const print = (value) => console.log(JSON.stringify(value))

try {
  const response = await stream({ url, offset, live, headers })
  if (live === false) {
    const items = await response.json()
    print({ items, offset: response.offset, upToDate: response.upToDate })
  } else {
    let ended = 0
    response.subscribeJson((batch) => {
      print({ items: batch.items, offset: batch.offset, upToDate: batch.upToDate })
      ended += batch.items.filter((item) => item.event.type === 'turn.completed').length
      if (ended >= Number(turns)) response.cancel()
    })
    await response.closed
  }
} catch (error) {
  print({ error: error.name, status: error.status, code: error.code, details: error.details ?? error.json })
}
process.exit(0)
