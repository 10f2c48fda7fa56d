import { useChat } from "@ai-sdk/react";
import {
  DefaultChatTransport,
  lastAssistantMessageIsCompleteWithApprovalResponses,
  lastAssistantMessageIsCompleteWithToolCalls,
} from "ai";
import { useEffect, useRef, useState, type KeyboardEvent } from "react";
import { isStreaming, stopTurn, type Conversation } from "./conversation";
import { Message } from "./Message";
import { useOtherDevices } from "./useOtherDevices";

const transport = new DefaultChatTransport({ api: "/api/chat" });

/** What the agent of `agentrun dev` understands. */
const EXAMPLES = ["Hello there", "count 60 80", "approve 20 80"];

export function Chat({ id, conversation }: { id: string; conversation: Conversation }) {
  const chat = useChat({
    id,
    messages: conversation.messages,
    transport,
    resume: isStreaming(conversation), // after a reload in mid-answer, go on with it
    sendAutomaticallyWhen: (options) =>
      lastAssistantMessageIsCompleteWithApprovalResponses(options) ||
      lastAssistantMessageIsCompleteWithToolCalls(options),
    throttle: 30,
  });
  useOtherDevices(chat, conversation);
  const { messages, status, error, sendMessage, stop } = chat;
  const busy = status === "submitted" || status === "streaming";
  const [problem, setProblem] = useState("");

  async function stopEverywhere() {
    try {
      await stopTurn(id); // the stream ends, here and on every other device
      await stop();
    } catch (error) {
      setProblem(explained(error as Error));
    }
  }

  function send(text: string) {
    setProblem("");
    sendMessage({ text });
  }

  return (
    <>
      <main role="log" aria-label="Conversation" aria-busy={busy}>
        {messages.length === 0 && <Welcome onPick={send} />}
        {messages.map((message, index) => (
          <Message
            key={message.id}
            message={message}
            streaming={busy && index === messages.length - 1}
            canAnswer={!busy}
            onApproval={chat.addToolApprovalResponse}
            onAnswer={chat.addToolOutput}
          />
        ))}
        {status === "submitted" && <p className="waiting">Waiting for an agent …</p>}
        {(error || problem) && (
          <p className="problem" role="alert">
            {problem || explained(error!)}
            {status === "error" && messages.at(-1)?.role === "user" && (
              <button onClick={() => sendMessage()}>Send again</button>
            )}
          </p>
        )}
        <Bottom follow={messages} />
      </main>
      <Composer status={status} busy={busy} onSend={send} onStop={stopEverywhere} />
    </>
  );
}

/** The gateway's errors are problem documents (RFC 9457). */
function explained(error: Error): string {
  try {
    return JSON.parse(error.message).detail ?? error.message;
  } catch {
    return error.message;
  }
}

function Welcome({ onPick }: { onPick: (text: string) => void }) {
  return (
    <div className="welcome">
      <p>Reload in mid-answer, open the link on another device, stop it from there: it is one conversation.</p>
      <div>
        {EXAMPLES.map((text) => (
          <button key={text} onClick={() => onPick(text)}>
            {text}
          </button>
        ))}
      </div>
    </div>
  );
}

type ComposerProps = { status: string; busy: boolean; onSend: (text: string) => void; onStop: () => void };

function Composer({ status, busy, onSend, onStop }: ComposerProps) {
  const [text, setText] = useState("");

  function submit() {
    if (busy || !text.trim()) return;
    onSend(text);
    setText("");
  }

  function onKeyDown(event: KeyboardEvent) {
    if (event.key !== "Enter" || event.shiftKey || event.nativeEvent.isComposing) return;
    event.preventDefault();
    submit();
  }

  return (
    <form
      data-status={status}
      onSubmit={(event) => {
        event.preventDefault();
        submit();
      }}
    >
      <textarea
        aria-label="Message"
        placeholder="Message"
        rows={1}
        autoFocus
        value={text}
        onChange={(event) => setText(event.target.value)}
        onKeyDown={onKeyDown}
      />
      {busy ? (
        <button type="button" className="stop" onClick={onStop}>
          Stop
        </button>
      ) : (
        <button type="submit" disabled={!text.trim()}>
          Send
        </button>
      )}
    </form>
  );
}

/** Keeps the end in view while the reader is there. */
function Bottom({ follow }: { follow: unknown }) {
  const end = useRef<HTMLDivElement>(null);
  const there = useRef(true);
  useEffect(() => {
    const watch = new IntersectionObserver(([entry]) => (there.current = entry.isIntersecting), {
      rootMargin: "120px",
    });
    watch.observe(end.current!);
    return () => watch.disconnect();
  }, []);
  useEffect(() => {
    if (there.current) end.current!.scrollIntoView({ block: "end" });
  }, [follow]);
  return <div ref={end} />;
}
