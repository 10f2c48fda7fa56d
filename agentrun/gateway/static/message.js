// The message of one attempt, put together from its events. The same fold as agentrun.message.MessageBuilder.

const has = (object, key) => Object.hasOwn(object, key)

export class MessageBuilder {
  /** @param {Array<object>} parts the message to go on from */
  constructor(parts = []) {
    this.parts = parts.map((part) => ({ ...part }))
    this.tokens = 0
    // Changes when parts were replaced, not only grown: who shows them looks at all of them again then.
    this.version = 0
  }

  get empty() {
    return this.parts.length === 0
  }

  replace(parts) {
    this.parts = parts.map((part) => ({ ...part }))
    this.version += 1
  }

  apply(event) {
    switch (event.type) {
      case 'text.delta':
        this.#count(event)
        this.#grow('text', event.text)
        break
      case 'reasoning.delta':
        this.#count(event)
        this.#grow('reasoning', event.text)
        break
      case 'tool.input.delta':
        this.#toolInput(event)
        break
      case 'tool.call': {
        const part = this.#tool(event.call)
        part.name = event.name
        part.input = event.input
        delete part.input_text
        break
      }
      case 'tool.result': {
        const part = this.#tool(event.call)
        const error = event.error ?? null
        delete part.output
        delete part.error
        if (error === null) part.output = event.output ?? null
        else part.error = error
        break
      }
      case 'data':
        this.#data(event)
        break
      case 'source':
        this.parts.push({ type: 'source', url: event.url, title: event.title ?? null, id: event.id ?? null })
        break
      case 'file':
        this.parts.push({ type: 'file', url: event.url, media_type: event.media_type, name: event.name ?? null })
        break
    }
  }

  #count(event) {
    // After a hole the index knows of tokens that were not seen.
    this.tokens = Math.max(this.tokens, event.index ?? 0) + (event.count ?? 1)
  }

  #grow(type, text) {
    if (text === '') return
    const last = this.parts.at(-1)
    if (last?.type === type) last.text += text
    else this.parts.push({ type, text })
  }

  #toolInput(event) {
    const part = this.#tool(event.call)
    if (has(part, 'input')) return
    if (event.name) part.name = event.name
    if (event.text) part.input_text = (part.input_text ?? '') + event.text
  }

  #tool(call) {
    const known = this.parts.findLast((part) => part.type === 'tool' && part.call === call)
    if (known) return known
    const part = { type: 'tool', call }
    this.parts.push(part)
    return part
  }

  #data(event) {
    if (event.transient) return
    const part = { type: 'data', name: event.name, data: event.data, id: event.id ?? null }
    if (part.id !== null) {
      const known = this.parts.findIndex((p) => p.type === 'data' && p.name === part.name && (p.id ?? null) === part.id)
      if (known >= 0) {
        this.parts[known] = part
        return
      }
    }
    this.parts.push(part)
  }
}

/** All text parts joined. */
export function textOf(parts) {
  return parts
    .filter((part) => part.type === 'text')
    .map((part) => part.text)
    .join('')
}

/** What a turn's input says to a person. */
export function inputText(input) {
  if (typeof input === 'string') return input
  if (Array.isArray(input) && input.length > 0) {
    if (input.every(isMessage))
      return lastOfUser(input)
        .map((message) => contentText(message.content))
        .join('\n')
    if (input.every((item) => typeof item?.type === 'string')) return contentText(input)
  }
  return isMessage(input) ? contentText(input.content) : JSON.stringify(input)
}

function isMessage(value) {
  return typeof value === 'object' && value !== null && typeof value.role === 'string'
}

function lastOfUser(messages) {
  const last = messages.findLastIndex((message) => message.role === 'user')
  if (last < 0) return messages
  let first = last
  while (first > 0 && messages[first - 1].role === 'user') first -= 1
  return messages.slice(first, last + 1)
}

function contentText(content) {
  if (typeof content === 'string') return content
  if (!Array.isArray(content)) return JSON.stringify(content ?? '')
  return content.map((part) => (typeof part?.text === 'string' ? part.text : `[${part?.type ?? 'part'}]`)).join('\n')
}
