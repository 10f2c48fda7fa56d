// One device with a chat of the AI SDK, unmodified: reads commands from stdin, prints its state whenever it changes.
//
//   node ai_device.mjs <chat|react> <default|workflow> <url> <chat id> [options as JSON]
//
// Commands: {do: send, text} {do: edit, id, text} {do: resume} {do: stop} {do: regenerate} {do: approve, id, approved}
// {do: output, tool, call, output} {do: load} {do: end}. Each is answered with {done: <command>}.
import { createInterface } from 'node:readline';
import {
  DefaultChatTransport,
  lastAssistantMessageIsCompleteWithApprovalResponses as approved,
  lastAssistantMessageIsCompleteWithToolCalls as called,
} from 'ai';
import { Chat, useChat } from '@ai-sdk/react';
import { WorkflowChatTransport } from '@ai-sdk/workflow/client';

const [surface, kind, url, id, json = '{}'] = process.argv.slice(2);
const options = JSON.parse(json);
const api = `${url}/api/chat`;
const requests = [];
const say = value => process.stdout.write(JSON.stringify(value) + '\n');

const counted = async (input, init) => {
  requests.push(`${init?.method ?? 'GET'} ${String(input).slice(url.length)}`);
  return fetch(input, init);
};

const transport =
  kind === 'workflow'
    ? new WorkflowChatTransport({
        api,
        fetch: counted,
        ...(options.named
          ? {
              prepareSendMessagesRequest: ({ id, messages, trigger, messageId, body }) => ({
                body: { id, messages, trigger, messageId, ...body },
              }),
            }
          : {}),
      })
    : new DefaultChatTransport({ api, fetch: counted, body: options.body });

const init = {
  id,
  transport,
  messages: options.load ? (await (await fetch(`${api}/${encodeURIComponent(id)}`)).json()).messages : [],
  onToolCall: ({ toolCall }) => say({ called: toolCall.toolName, call: toolCall.toolCallId, input: toolCall.input }),
  onFinish: ({ finishReason, isError, isDisconnect }) => say({ finished: finishReason ?? null, isError, isDisconnect }),
  ...(options.auto ? { sendAutomaticallyWhen: given => approved(given) || called(given) } : {}),
};

const textOf = message =>
  (message?.parts ?? []).filter(part => part.type === 'text').map(part => part.text).join('');

function report(chat) {
  const last = chat.messages.at(-1);
  const text = last?.role === 'assistant' ? textOf(last) : '';
  say({ status: chat.status, text, error: chat.error?.message ?? null });
}

async function inNode() {
  const chat = new Chat(init);
  chat['~registerStatusCallback'](() => report(chat));
  chat['~registerMessagesCallback'](() => report(chat));
  return () => chat;
}

// A page: React in jsdom, StrictMode, so that effects run twice as in development.
async function inReact() {
  const { JSDOM } = await import('jsdom');
  const { window } = new JSDOM('<div id="root"></div>', { url });
  Object.assign(globalThis, { window, document: window.document });
  const React = await import('react');
  const { createRoot } = await import('react-dom/client');
  let latest;
  let mounted = 0;
  function Page() {
    latest = useChat({ ...init, resume: options.resume === true });
    const { messages, status, error } = latest;
    React.useEffect(() => report({ messages, status, error }), [messages, status, error]);
    React.useEffect(() => void mounted++, []);
    return messages.map(message => React.createElement('p', { key: message.id, id: message.id }, textOf(message)));
  }
  createRoot(window.document.getElementById('root')).render(
    React.createElement(React.StrictMode, null, React.createElement(Page)),
  );
  while (mounted < 2) await new Promise(resolve => setTimeout(resolve, 5));
  return () => latest;
}

const current = await (surface === 'react' ? inReact() : inNode());

// What is shown once nothing moves any more.
async function settled() {
  for (let before = ''; ; ) {
    const { messages, status } = current();
    const state = { messages, status, requests };
    const now = JSON.stringify(state);
    if (now === before && (status === 'ready' || status === 'error')) return state;
    before = now;
    await new Promise(resolve => setTimeout(resolve, 60));
  }
}

const commands = {
  send: ({ text, more }) => current().sendMessage({ text }, more),
  edit: ({ id, text }) => current().sendMessage({ text, messageId: id }),
  resume: () => current().resumeStream(),
  stop: () => current().stop(),
  halt: async () => (await fetch(`${api}/${encodeURIComponent(id)}/stop`, { method: 'POST' })).json(),
  regenerate: () => current().regenerate(),
  approve: ({ id, approved }) => current().addToolApprovalResponse({ id, approved }),
  output: ({ tool, call, output }) => current().addToolOutput({ tool, toolCallId: call, output }),
  state: settled,
};

say({ ready: true });
for await (const line of createInterface({ input: process.stdin })) {
  const command = JSON.parse(line);
  if (command.do === 'end') break;
  // Not waited for: a device that is answered can be stopped.
  Promise.resolve(commands[command.do](command)).then(
    result => say({ done: command.do, result: result ?? null }),
    error => say({ done: command.do, failed: String(error) }),
  );
}
process.exit(0);
