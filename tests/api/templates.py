"""Chat templates in the manner of each family: short, but with all that theirs do with tools."""

from __future__ import annotations

HERMES = """{%- if tools %}{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
{{- "# Tools\\n\\n<tools>" }}{%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
{{- "\\n</tools>\\n\\nFor each function call, return:" }}
{{- "\\n<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": " }}
{{- "<args-json-object>}\\n</tool_call><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == "user" or (message.role == "system" and not loop.first) %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- elif message.role == "assistant" %}{{- '<|im_start|>assistant\\n' + message.content }}
{%- for tool_call in message.tool_calls or [] %}
{%- if (loop.first and message.content) or not loop.first %}{{- '\\n' }}{%- endif %}
{%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
{{- '<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
{%- if tool_call.arguments is string %}{{- tool_call.arguments }}{%- else %}{{- tool_call.arguments | tojson }}
{%- endif %}{{- '}\\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}
{%- elif message.role == "tool" %}
{%- if loop.first or messages[loop.index0 - 1].role != "tool" %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

QWEN_CODER = """{%- if tools is iterable and tools | length > 0 %}{{- "<|im_start|>system\\n<tools>" }}
{%- for tool in tools %}{%- set tool = tool.function %}
{{- "\\n<function>\\n<name>" ~ tool.name ~ "</name>\\n<description>" ~ (tool.description | trim) ~ "</description>" }}
{%- for name, fields in tool.parameters.properties | items %}
{{- "\\n<parameter>\\n<name>" ~ name ~ "</name>\\n<type>" ~ (fields.type | string) ~ "</type>\\n</parameter>" }}
{%- endfor %}{{- "\\n</function>" }}{%- endfor %}
{{- "\\n</tools>\\nReply:\\n<tool_call>\\n<function=example>\\n<parameter=a>\\n1\\n</parameter>\\n</function>\\n" }}
{{- "</tool_call><|im_end|>\\n" }}{%- endif %}
{%- for message in messages %}
{%- if message.role == "assistant" and message.tool_calls is defined and message.tool_calls is iterable %}
{{- '<|im_start|>assistant' }}{%- if message.content %}{{- '\\n' + message.content | trim + '\\n' }}{%- endif %}
{%- for tool_call in message.tool_calls %}{%- set tool_call = tool_call.function %}
{{- '\\n<tool_call>\\n<function=' + tool_call.name + '>\\n' }}
{%- for name, value in tool_call.arguments | items %}{{- '<parameter=' + name + '>\\n' }}
{{- value | tojson | safe if value is mapping or (value is sequence and value is not string) else value | string }}
{{- '\\n</parameter>\\n' }}{%- endfor %}{{- '</function>\\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}
{%- elif message.role == "tool" %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response>\\n<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

LLAMA = """{{- bos_token }}{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] | trim %}
{%- set messages = messages[1:] %}{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}{%- if tools is not none %}{{- "Environment: ipython\\n" }}
{%- endif %}{{- system_message }}{{- "<|eot_id|>" }}
{%- if tools is not none %}{%- set first = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{{- '<|start_header_id|>user<|end_header_id|>\\n\\nRespond with {"name": function name, "parameters": dictionary}.' }}
{%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}{{- first + "<|eot_id|>" }}{%- endif %}
{%- for message in messages %}
{%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- elif 'tool_calls' in message %}
{%- if not message.tool_calls | length == 1 %}{{- raise_exception("This model only supports single tool-calls!") }}
{%- endif %}{%- set tool_call = message.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + tool_call.name + '", "parameters": ' }}
{{- tool_call.arguments | tojson }}{{- "}<|eot_id|>" }}
{%- else %}{{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
{%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
{%- else %}{{- message.content }}{%- endif %}{{- "<|eot_id|>" }}{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

MISTRAL = """{{- bos_token }}
{%- set user_messages = messages | selectattr("role", "equalto", "user") | list %}
{%- for message in messages %}
{%- if message["role"] == "user" %}
{%- if tools is not none and (message == user_messages[-1]) %}{{- "[AVAILABLE_TOOLS] [" }}
{%- for tool in tools %}{%- set tool = tool.function %}{{- '{"type": "function", "function": {' }}
{%- for key, val in tool.items() if key != "return" %}
{%- if val is string %}{{- '"' + key + '": "' + val + '"' }}{%- else %}{{- '"' + key + '": ' + val | tojson }}
{%- endif %}
{%- if not loop.last %}{{- ", " }}{%- endif %}{%- endfor %}{{- "}}" }}
{%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}{%- endfor %}{{- "[/AVAILABLE_TOOLS]" }}{%- endif %}
{{- '[INST]' + message['content'] + '[/INST]' }}
{%- elif message.tool_calls is defined %}{{- "[TOOL_CALLS] [" }}
{%- for tool_call in message.tool_calls %}{%- set out = tool_call.function | tojson %}{{- out[:-1] }}
{%- if not tool_call.id is defined or tool_call.id | length != 9 %}
{{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}{%- endif %}
{{- ', "id": "' + tool_call.id + '"}' }}{%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" + eos_token }}{%- endif %}
{%- endfor %}
{%- elif message['role'] == 'assistant' %}{{- message['content'] + eos_token }}
{%- elif message['role'] == 'tool' %}
{%- if not message.tool_call_id is defined or message.tool_call_id | length != 9 %}
{{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}{%- endif %}
{{- '[TOOL_RESULTS] {"content": ' + message.content | string + ', "call_id": "' + message.tool_call_id }}
{{- '"}[/TOOL_RESULTS]' }}
{%- else %}{{- raise_exception("Only user and assistant roles are supported!") }}{%- endif %}{%- endfor %}"""

HARMONY = """{{- "<|start|>system<|message|>Valid channels: analysis, commentary, final." }}
{%- if tools %}{{- "\\nCalls to these tools must go to the commentary channel: 'functions'." }}{%- endif %}
{{- "<|end|>" }}{%- if tools %}{{- "<|start|>developer<|message|># Tools\\n\\nnamespace functions {\\n" }}
{%- for tool in tools %}{{- "\\n// " + tool.function.description + "\\ntype " + tool.function.name + " = (_: {" }}
{%- for name, spec in tool.function.parameters.properties.items() %}{{- "\\n" + name + ": " + spec.type + "," }}
{%- endfor %}{{- "\\n}) => any;" }}{%- endfor %}{{- "\\n}<|end|>" }}{%- endif %}
{%- set last = namespace(name=none) %}
{%- for message in messages %}
{%- if message.role == 'assistant' and "tool_calls" in message %}
{%- set tool_call = message.tool_calls[0].function %}
{%- if message.content %}{{- "<|start|>assistant<|channel|>analysis<|message|>" + message.content + "<|end|>" }}
{%- endif %}
{{- "<|start|>assistant to=functions." + tool_call.name + "<|channel|>commentary json<|message|>" }}
{{- tool_call.arguments | tojson }}{{- "<|call|>" }}{%- set last.name = tool_call.name %}
{%- elif message.role == 'assistant' %}
{{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|end|>" }}{%- set last.name = none %}
{%- elif message.role == 'tool' %}
{%- if last.name is none %}{{- raise_exception("there was no previous assistant message with a tool call!") }}
{%- endif %}
{{- "<|start|>functions." + last.name + " to=assistant<|channel|>commentary<|message|>" + message.content | tojson }}
{{- "<|end|>" }}
{%- else %}{{- "<|start|>" + message.role + "<|message|>" + message.content + "<|end|>" }}{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- "<|start|>assistant" }}{%- endif %}"""

GEMMA_4 = """{%- macro value(it) -%}
{%- if it is string -%}{{- '<|"|>' + it + '<|"|>' -}}{%- elif it is boolean -%}{{- 'true' if it else 'false' -}}
{%- elif it is mapping -%}{{- '{' -}}{%- for key, one in it | dictsort -%}{{- key -}}:{{- value(one) -}}
{%- if not loop.last %},{% endif -%}{%- endfor -%}{{- '}' -}}{%- else -%}{{- it -}}{%- endif -%}{%- endmacro -%}
{{- bos_token -}}{%- if tools or messages[0].role == 'system' -%}{{- '<|turn>system\\n' -}}
{%- if messages[0].role == 'system' -%}{{- messages[0].content | trim -}}{%- set messages = messages[1:] -%}
{%- endif -%}
{%- for tool in tools or [] -%}{{- '<|tool>declaration:' + tool.function.name + '{description:' -}}
{{- value(tool.function.description) + ',parameters:' + value(tool.function.parameters) + '}<tool|>' -}}{%- endfor -%}
{{- '<turn|>\\n' -}}{%- endif -%}{%- set ns = namespace(open=false) -%}
{%- for message in messages -%}
{{- '<|turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' -}}
{%- for call in message.tool_calls or [] -%}{{- '<|tool_call>call:' + call.function.name + '{' -}}
{%- if call.function.arguments is mapping -%}
{%- for key, one in call.function.arguments | dictsort -%}{{- key -}}:{{- value(one) -}}
{%- if not loop.last %},{% endif -%}{%- endfor -%}
{%- else -%}{{- call.function.arguments -}}{%- endif -%}{{- '}<tool_call|>' -}}{%- endfor -%}
{%- for one in message.tool_responses or [] -%}{{- '<|tool_response>response:' + one.name -}}
{{- value(one.response) if one.response is mapping else '{value:' + value(one.response) + '}' -}}
{{- '<tool_response|>' -}}{%- endfor -%}{{- message.content | trim -}}
{%- set ns.open = message.tool_responses and not message.content -%}
{%- if not ns.open -%}{{- '<turn|>\\n' -}}{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt and not ns.open -%}{{- '<|turn>model\\n' -}}{%- endif -%}"""

DEEPSEEK = """{%- for message in messages %}{%- if message.tool_calls %}
{%- for tool in message.tool_calls %}{{- tool.function.name + '\\n```json\\n' + tool.function.arguments + '\\n```' }}
{%- endfor %}{%- elif message.role == 'tool' %}{{- '<out>' + message.content + '</out>' }}
{%- else %}{{- message.role + ':' + message.content + '\\n' }}{%- endif %}{%- endfor %}
{%- if tools %}{{- tools | tojson }}{%- endif %}"""

GEMMA_3 = """{{- bos_token }}{%- if messages[0]['role'] == 'system' -%}
{%- set prefix = messages[0]['content'] + '\\n\\n' -%}
{%- set messages = messages[1:] -%}{%- else -%}{%- set prefix = "" -%}{%- endif -%}
{%- for message in messages -%}{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}{%- endif -%}
{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}
{{- (prefix if loop.first else "") + message['content'] | trim + '<end_of_turn>\\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' }}{%- endif -%}"""

NO_SYSTEM = GEMMA_3.replace("{%- set prefix = messages[0]['content'] + '\\n\\n' -%}",
                            "{{- raise_exception('System role not supported') }}")  # fmt: skip
