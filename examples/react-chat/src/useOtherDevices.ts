import type { UseChatHelpers } from "@ai-sdk/react";
import type { UIMessage } from "ai";
import { useEffect, useReducer, useRef } from "react";
import { isStreaming, load, type Conversation } from "./conversation";

const PAUSE = 1000;

/**
 * What `useChat` does not do by itself: notice what other devices do while nothing streams here, and go on after the
 * connection was lost. While idle it waits for the next event of the session's log, then loads the conversation, and
 * joins what is being said.
 */
export function useOtherDevices(chat: UseChatHelpers<UIMessage>, loaded: Conversation) {
  const { id, messages, status, error, setMessages, sendMessage, resumeStream, clearError } = chat;
  const [round, again] = useReducer((n: number) => n + 1, 0);
  const known = useRef<Conversation | undefined>(loaded);
  const joined = useRef(0);
  const shown = useRef(messages);
  shown.current = messages;

  const busy = status === "submitted" || status === "streaming";
  const lost = status === "error" && error instanceof TypeError; // which is how fetch tells it

  useEffect(() => {
    if (busy) return;
    let over = false;
    let timer: ReturnType<typeof setTimeout> | undefined;
    let events: EventSource | undefined;
    const later = () => {
      if (!over) timer = setTimeout(again, PAUSE);
    };

    /** Bring this device up to date; return the offset to wait behind, if that is what is left to do. */
    async function catchUp(): Promise<number | void> {
      const before = shown.current;
      const now = await load(id);
      if (over) return;
      if (shown.current !== before) return again();
      const last = before.at(-1);
      if (status === "error" && last?.role === "user" && !now.messages.some((message) => message.id === last.id)) {
        if (lost) sendMessage(); // it did not arrive, or did it? Its id makes sending it again safe.
        return;
      }
      setMessages(now.messages);
      const streaming = isStreaming(now);
      if (!streaming && lost) return clearError();
      if (!streaming || (!lost && joined.current === now.offset)) return now.offset;
      joined.current = now.offset;
      await resumeStream();
      later();
    }

    function wait(offset: number) {
      events = new EventSource(`/v1/sessions/${id}/events?after=${offset}`);
      events.onmessage = () => {
        events!.close();
        again();
      };
      events.onerror = () => events!.readyState === EventSource.CLOSED && later();
    }

    const first = known.current;
    known.current = undefined;
    if (first) wait(first.offset);
    else catchUp().then((offset) => typeof offset === "number" && !over && wait(offset), later);
    return () => {
      over = true;
      clearTimeout(timer);
      events?.close();
    };
  }, [id, busy, lost, round]);
}
