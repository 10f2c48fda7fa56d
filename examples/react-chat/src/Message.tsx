import { getToolName, isToolUIPart, type DynamicToolUIPart, type ToolUIPart, type UIMessage } from "ai";
import { useState } from "react";

type Tool = ToolUIPart | DynamicToolUIPart;
type OnApproval = (answer: { id: string; approved: boolean }) => void;
type OnAnswer = (answer: { tool: string; toolCallId: string; output: unknown }) => void;
type Props = {
  message: UIMessage;
  streaming: boolean;
  canAnswer: boolean;
  onApproval: OnApproval;
  onAnswer: OnAnswer;
};

export function Message({ message, streaming, canAnswer, onApproval, onAnswer }: Props) {
  return (
    <article className={message.role} aria-label={message.role === "user" ? "You" : "Agent"}>
      {message.parts.map((part, index) => {
        if (part.type === "text") return <p key={index} className="text">{part.text}</p>;
        if (part.type === "reasoning") {
          const thinking = streaming && index === message.parts.length - 1;
          return (
            <details key={index} className="reasoning" open={thinking}>
              <summary>{thinking ? "Thinking …" : "Thoughts"}</summary>
              <p className="text">{part.text}</p>
            </details>
          );
        }
        if (isToolUIPart(part)) {
          const tool = { part, canAnswer };
          if (getToolName(part) === "question") return <Question key={part.toolCallId} {...tool} onAnswer={onAnswer} />;
          return <ToolCall key={part.toolCallId} {...tool} onApproval={onApproval} />;
        }
        if (part.type === "source-url") {
          return <p key={index} className="source"><a href={part.url}>{part.title ?? part.url}</a></p>;
        }
        if (part.type === "file") {
          return <p key={index} className="source"><a href={part.url}>{part.filename ?? part.mediaType}</a></p>;
        }
        return null;
      })}
      {streaming && message.role === "assistant" && <span className="caret" aria-hidden />}
    </article>
  );
}

const STATES: Record<Tool["state"], string> = {
  "input-streaming": "is being called",
  "input-available": "runs",
  "approval-requested": "waits for you",
  "approval-responded": "runs",
  "output-available": "done",
  "output-error": "failed",
  "output-denied": "denied",
};

function ToolCall({ part, canAnswer, onApproval }: { part: Tool; canAnswer: boolean; onApproval: OnApproval }) {
  const name = getToolName(part);
  const denied = part.approval?.approved === false; // the agent may tell so itself, as the call's error
  const asks = part.state === "approval-requested" && !part.approval.isAutomatic ? part.approval : undefined;
  return (
    <section className="tool" data-state={part.state} aria-label={`Tool ${name}`}>
      <details>
        <summary>
          <code>{name}</code> <span className="state">{denied ? "denied" : STATES[part.state]}</span>
        </summary>
        <Json label="Input" value={part.input} />
        {part.state === "output-available" && <Json label="Output" value={part.output} />}
      </details>
      {part.state === "output-error" && !denied && <p className="problem">{part.errorText}</p>}
      {asks && (
        <fieldset className="ask" disabled={!canAnswer}>
          <p>{asks.requestReason ?? `Run ${name}?`}</p>
          <button onClick={() => onApproval({ id: asks.id, approved: true })}>Approve</button>
          <button onClick={() => onApproval({ id: asks.id, approved: false })}>Deny</button>
        </fieldset>
      )}
    </section>
  );
}

/** What the agent asks with `ctx.ask`: a choice, or text. */
function Question({ part, canAnswer, onAnswer }: { part: Tool; canAnswer: boolean; onAnswer: OnAnswer }) {
  const [text, setText] = useState("");
  const { prompt, choices } = (part.input ?? {}) as { prompt?: string; choices?: string[] };
  const answer = (output: string) => onAnswer({ tool: "question", toolCallId: part.toolCallId, output });
  return (
    <section className="tool" data-state={part.state} aria-label="Question">
      <p>{prompt}</p>
      {part.state === "output-available" && <p className="text">{String(part.output)}</p>}
      {part.state === "input-available" && (
        <fieldset className="ask" disabled={!canAnswer}>
          {choices?.map((choice) => <button key={choice} onClick={() => answer(choice)}>{choice}</button>)}
          {!choices && (
            <>
              <input aria-label="Answer" value={text} onChange={(event) => setText(event.target.value)} />
              <button disabled={!text} onClick={() => answer(text)}>Answer</button>
            </>
          )}
        </fieldset>
      )}
    </section>
  );
}

function Json({ label, value }: { label: string; value: unknown }) {
  return (
    <>
      <small>{label}</small>
      <pre>{JSON.stringify(value, null, 2)}</pre>
    </>
  );
}
