// What the test asks through OpenAI's Node client; prints one JSON object with all that came back.
import OpenAI from "openai";

const [baseURL, model, bias] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0, timeout: 60_000 });
const messages = [{ role: "user", content: "Why is the sky blue?" }];
const tools = [
  {
    type: "function",
    function: {
      name: "weather",
      description: "The weather in a city",
      strict: true,
      parameters: {
        type: "object",
        properties: { city: { type: "string", enum: ["Paris", "Rome"] }, days: { type: "integer", enum: [1, 2] } },
        required: ["city", "days"],
        additionalProperties: false,
      },
    },
  },
];
const greedy = { model, messages, temperature: 0, max_tokens: 16 };
// A random model would fill JSON with blanks.
const terse = { ...greedy, max_tokens: 400, logit_bias: JSON.parse(bias) };
const told = {};

told.models = (await client.models.list()).data.map((each) => each.id);

const chat = await client.chat.completions.create(greedy);
told.chat = { text: chat.choices[0].message.content, usage: chat.usage };

told.stream = { text: "", chunks: 0 };
const stream = await client.chat.completions.create({
  ...greedy,
  stream: true,
  stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  told.stream.chunks += 1;
  told.stream.text += chunk.choices[0]?.delta?.content ?? "";
  told.stream.finish ??= chunk.choices[0]?.finish_reason ?? undefined;
  told.stream.usage = chunk.usage ?? told.stream.usage;
}

const call = await client.chat.completions.create({ ...terse, tools, tool_choice: "required" });
told.tools = {
  finish: call.choices[0].finish_reason,
  calls: call.choices[0].message.tool_calls.map((each) => [each.function.name, JSON.parse(each.function.arguments)]),
};

const runner = client.chat.completions.stream({ ...terse, tools, tool_choice: "required" });
const final = await runner.finalChatCompletion();
told.streamedTools = {
  finish: final.choices[0].finish_reason,
  calls: final.choices[0].message.tool_calls.map((each) => [each.function.name, JSON.parse(each.function.arguments)]),
};

const json = await client.chat.completions.create({
  ...terse,
  response_format: {
    type: "json_schema",
    json_schema: {
      name: "answer",
      strict: true,
      schema: {
        type: "object",
        properties: { ok: { type: "boolean" } },
        required: ["ok"],
        additionalProperties: false,
      },
    },
  },
});
told.json = JSON.parse(json.choices[0].message.content);

try {
  await client.chat.completions.create({ ...greedy, temperature: 9 });
} catch (error) {
  told.error = { kind: error.constructor.name, status: error.status, param: error.param, type: error.type };
}

const aborted = await client.chat.completions.create({
  ...greedy,
  max_tokens: 20_000,
  ignore_eos: true,
  stream: true,
});
for await (const chunk of aborted) {
  if (chunk.choices[0]?.delta?.content !== undefined) break; // leaving the loop closes the connection
}

console.log(JSON.stringify(told));
